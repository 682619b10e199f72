import random, sys, time, torch, traceback
sys.path.insert(0, "benchmarks")
from transformers import AutoModelForCausalLM, LlamaConfig
from redrafter import generate, RecurrentDrafter, PromptLookup, TwoModel, EagleHead
from redrafter.engine.engine import Engine
torch.manual_seed(0)
P="src/redrafter/assets/demo/"
m=AutoModelForCausalLM.from_pretrained(P+"redrafter-demo-12m").cuda().float()
d=RecurrentDrafter.from_pretrained(P+"drafter",target=m)
eg=EagleHead.from_pretrained(P+"eagle",target=m)
g=random.Random(0)
prompts=[[g.randrange(3,400) for _ in range(g.choice([1,2,5,20,60,200]))] for _ in range(24)]
def sett(i):
    return [dict(max_new_tokens=60),dict(max_new_tokens=40,do_sample=True,temperature=.7,seed=i),dict(max_new_tokens=50,do_sample=True,top_p=.8,top_k=30,seed=i),dict(max_new_tokens=30,presence_penalty=.5,repetition_penalty=1.1),dict(max_new_tokens=45,no_repeat_ngram_size=3),dict(max_new_tokens=33,do_sample=True,seed=i,min_p=.1,logit_bias={7:1.5}),dict(max_new_tokens=40,drafter=False)][i%7]
def solo(i):
    s=dict(sett(i)); s.pop("drafter",None)
    return generate(m,None,[prompts[i]],eos_token_id=(),**s).new_tokens[0]
torch.backends.cuda.matmul.allow_tf32=False
want=[solo(i) for i in range(24)]
for name,dr in (("none",None),("recurrent",d),("lookup",PromptLookup()),("eagle",eg),("two",TwoModel(m))):
    for subset in ("greedy","all"):
        try:
            with Engine(m,dr,slots=8,max_length=400) as e:
                for r in range(3):
                    idx=[i for i in range(24) if subset=="all" or i%7==0 or i%7==6]
                    subs=[]
                    for i in idx:
                        subs.append((i,e.submit(prompts[i],eos_token_id=(),**sett(i))))
                        if r==2: time.sleep(g.random()*.02)
                    bad=[]
                    for i,s in subs:
                        got=s.result(100).new_tokens
                        if got!=want[i]: bad.append((i,next((k for k,(a,b) in enumerate(zip(got,want[i])) if a!=b),-1)))
                    print(name,subset,r,"bad",bad, e.statistics().steps, round(e.statistics().generated_tokens/e.statistics().steps,2), flush=True)
                print(len(e._runner._steps), e._runner.describe()["a step"], flush=True)
        except Exception: traceback.print_exc()
    gen=generate(m,dr,prompts,eos_token_id=(),max_new_tokens=60,batch_size=6)
    print(name,"generate",sum(a==b for a,b in zip([gen.new_tokens[i] for i in range(0,24,7)],[want[i] for i in range(0,24,7)])),"of 4", gen.stats.tokens_per_step, flush=True)
