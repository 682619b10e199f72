import sys, time, cProfile, pstats, random, torch
sys.path.insert(0,"benchmarks"); import serving
from redrafter.engine.request import tasks
from redrafter.engine.runner import Runner
from redrafter.engine.scheduler import Scheduler
from redrafter.decoding.step import Decoder
from redrafter.targets.target import Target
m=serving.random_model(sys.argv[1] if len(sys.argv)>1 else "smollm2"); t=Target(m)
S=int(sys.argv[2]) if len(sys.argv)>2 else 128
r=Runner({1:Decoder(t,None)},batch=S,slots=512); s=Scheduler(r,read_tokens=512)
g=random.Random(0)
def add(n):
    for _ in range(n):
        _,ts=tasks(t,[serving.prompt(g,g.randint(16,96))],max_new_tokens=g.randint(1,256),eos_token_id=())
        s.add(ts[0])
add(3*S)
for _ in range(250): s.step()
def measure(n,prof):
    add(3*S)
    p=cProfile.Profile(); 
    if prof: p.enable()
    b=time.perf_counter(); tok=0
    for _ in range(n): tok+=sum(len(e.tokens) for _,e in s.step())
    e=time.perf_counter()-b
    if prof: p.disable(); pstats.Stats(p).sort_stats("tottime").print_stats(25)
    print("ms/step",1e3*e/n,"tok/s",tok/e,flush=True)
measure(200,False); measure(200,True)
from collections import Counter
for k,c in r._steps.items():
    if c.replaying:
        ev=[torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize(); ev[0].record()
        for _ in range(30): c._graph.replay()
        ev[1].record(); torch.cuda.synchronize()
        print((k[0],k[-1]), round(ev[0].elapsed_time(ev[1])/30,3))
    else: print((k[0],k[-1]),"not captured",c._calls)
