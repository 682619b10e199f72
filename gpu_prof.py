import sys, time, cProfile, pstats, random, statistics, torch, os
sys.path.insert(0,"benchmarks")
import serving
from redrafter.engine.request import tasks, Request
from redrafter.engine.runner import Runner
from redrafter.engine.scheduler import Scheduler
from redrafter.decoding.step import Decoder
from redrafter.targets.target import Target
shape=sys.argv[1] if len(sys.argv)>1 else "smollm2"
m=serving.random_model(shape)
t=Target(m)
def run(n, slots, steps, prof=False):
    r=Runner({1:Decoder(t,None)},batch=slots,slots=512)
    s=Scheduler(r)
    g=random.Random(0)
    _,ts=tasks(t,[[g.randrange(1,400) for _ in range(40)] for _ in range(n)],max_new_tokens=400,eos_token_id=())
    for x in ts: s.add(x)
    for _ in range(40): s.step()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    p=cProfile.Profile()
    if prof: p.enable()
    b=time.perf_counter()
    for _ in range(steps): s.step()
    e=(time.perf_counter()-b)/steps*1e3
    if prof:
        p.disable(); pstats.Stats(p).sort_stats("tottime").print_stats(22)
    print(f"rows {n} slots {slots}: {e:.3f} ms/step, seconds {r._seconds*1e3:.3f}, ahead {r.launches_ahead}", flush=True)
    if torch.cuda.is_available():
        st=list(r._steps.values())
        g=[x for x in st if x.replaying][-1]
        ev=[torch.cuda.Event(enable_timing=True) for _ in range(2)]
        ev[0].record()
        for _ in range(50): g._graph.replay()
        ev[1].record(); torch.cuda.synchronize()
        print("  graph alone", ev[0].elapsed_time(ev[1])/50, flush=True)
        b=time.perf_counter()
        for _ in range(50): g._graph.replay()
        h=time.perf_counter()-b
        torch.cuda.synchronize()
        print("  host per replay ms", h/50*1e3, "wall", (time.perf_counter()-b)/50*1e3, flush=True)
run(1,1,200); run(1,1,100,True); run(32,32,100); run(32,32,100,True)
run(128,128,100)
