import cProfile, pstats, sys, torch
sys.path.insert(0,"benchmarks"); import serving
from redrafter import generate, stream
m=serving.random_model("smollm2")
def call(n=8): return generate(m,None,[[5,6,7,8]],max_new_tokens=n,eos_token_id=())
for _ in range(4): call()
p=cProfile.Profile(); p.enable()
for _ in range(10): call()
p.disable(); pstats.Stats(p).sort_stats("cumtime").print_stats(45)
