"""The same from a shell"""
__all__ = ['round_trip', 'evaluate_dpm', 'bench_speed', 'COMMANDS', 'main']

# %% imports
import json, os, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import torch
from fastcore.script import anno_parser
from pdae_nb.data import folder, load_images, mnist_or_digits, show, to_signed
from pdae_nb.forward import Schedule
from pdae_nb.denoise import denoising_loss, loss_curve
from pdae_nb.sample import belm_step, ddim_step, dpmpp_step, invert, invert_exactly, sample
from pdae_nb.unet import UNet
from pdae_nb.files import Stopped, load_run, models_dir
from pdae_nb.train import RECIPES, EMA, fit, hardware, noise_mse, recipe, train as train_run, versions

# %% helpers
SOLVERS = dict(ddim=ddim_step, dpmpp=dpmpp_step, belm=belm_step)

def _dpm(name, device=None):
    run = load_run(name)
    if not hasattr(run, 'dpm'): raise ValueError(f'the run {name!r} holds {sorted(run.about["parts"])}, not a `dpm`')
    return run, run.dpm.to(device or ('cuda' if torch.cuda.is_available() else 'cpu'), memory_format=torch.channels_last)

def _noise(net, n, seed): return torch.randn(n, net.config['c'], *[net.config['size']]*2, generator=torch.Generator().manual_seed(seed)).to(next(net.parameters()).device)

def _results(): return models_dir().parent/'results'

def _write_json(path, d): Path(path).parent.mkdir(parents=True, exist_ok=True); Path(path).write_text(json.dumps(d, indent=1) + '\n'); return str(path)

def _picture(x, path, title=None, **kw):
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    path = Path(path); path.parent.mkdir(parents=True, exist_ok=True)
    ax = show(x, **kw); fig = ax.figure; ax.set_title(title or '', fontsize=9)
    fig.savefig(path, dpi=110, bbox_inches='tight'); plt.close(fig)
    return path

def _rows(x, y): "x over y, column by column, 8 wide"; return torch.cat([torch.cat([a, b]) for a, b in zip(x.split(8), y.split(8))])

# %% round_trip
def round_trip(net, x0, sched, steps=100, exact=False):
    "x_T and reconstruction of `x0`: DDIM up and down again, or O-BELM, which loses nothing but rounding (PDAE Eq. 8)"
    if not exact:
        xT = invert(net, x0, sched, steps)
        return xT, sample(net, xT, sched, steps)
    pair = invert_exactly(net, x0, sched, steps)
    return pair.xT, sample(net, pair, sched, steps, solver=belm_step)

# %% evaluate
@torch.no_grad()
def evaluate_dpm(
    name,                # a run with a `dpm`
    n=1000,              # samples to show the judge
    steps=50,            # DDIM steps
    judge='mnist_judge', # run with a `judge` of such images, or ''
    test_images=10_000,  # test images for the noise MSE
    device=None,
) -> dict:               # numbers, ready for JSON
    "Everything this library says about a DPM in numbers"
    run, net = _dpm(name, device); dev = next(net.parameters()).device
    px, t0 = net.config['size'], time.time()
    x0 = to_signed(load_images(run.recipe['data'], 'test', px).x[:test_images]).to(dev)
    mse, t = noise_mse(net, x0, run.sched)
    ts = [1, 2, 5, 10, 20, 50, 100, 150, 200, 300, 400, 500, 600, 700, 800, 900, 1000]
    curve = loss_curve(net, x0[:500], run.sched, ts)
    d = dict(run=name, test_noise_mse=mse.mean().item(), standard_error=(mse.std()/len(mse)**.5).item(), test_images=len(mse),
             mse_by_t_quarter=[mse[(t - 1)*4//run.sched.T == q].mean().item() for q in range(4)],
             curve=dict(t=ts, mse=curve.mean(1).tolist(), standard_error=(curve.std(1)/curve.shape[1]**.5).tolist(), images=curve.shape[1]))
    for exact, s in (False, 100), (True, 50):
        _, back = round_trip(net, x0[:64], run.sched, s, exact)
        d[f'round_trip_{"belm" if exact else "ddim"}'] = dict(steps=s, images=64, mse01=(back - x0[:64]).square().mean().item()/4, largest=(back - x0[:64]).abs().max().item()/2)
    if judge:
        x = torch.cat([sample(net, o, run.sched, steps, clip=1.) for o in _noise(net, n, 0).split(100)])
        sure = lambda x: torch.cat([clf(o).softmax(1) for o in x.split(500)])
        clf = load_run(judge).judge.to(dev); p, q = sure(x), sure(x0)
        d['judge'] = dict(name=judge, accuracy_on_test=load_run(judge).about['result']['test_accuracy'], samples=n, steps=steps, sure_of_samples=(p.amax(1) > .9).float().mean().item(),
                          sure_of_test=(q.amax(1) > .9).float().mean().item(), classes=p.argmax(1).bincount(minlength=p.shape[1]).tolist())
    return d | dict(seconds=round(time.time() - t0), hardware=hardware(dev), versions=versions(), size=run.about.get('size'))

# %% bench
def _rate(f, n, seconds):
    "Images per second of `f`, which handles `n`: the median of as many calls as fit into `seconds`, at least 3, after one to warm up"
    f(); ts = []
    while len(ts) < 3 or sum(ts) < seconds: t = time.perf_counter(); f(); ts.append(time.perf_counter() - t)
    return n/sorted(ts)[len(ts)//2]

def _flops(net, x, t):
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as c, torch.no_grad(): net(x, t)
    return c.get_total_flops()/len(x)

def _peak(dev, dtype, seconds):
    "The machine's own best, FLOP/s: a large matmul and a 3x3 convolution"
    a = torch.randn(2048, 2048, device=dev, dtype=dtype)
    x, w = torch.randn(32, 128, 32, 32, device=dev, dtype=dtype).contiguous(memory_format=torch.channels_last), torch.randn(128, 128, 3, 3, device=dev, dtype=dtype)
    sync = torch.cuda.synchronize if dev.type == 'cuda' else lambda: None
    def mm(): a @ a; sync()
    def conv(): torch.conv2d(x, w, padding=1); sync()
    return dict(matmul=_rate(mm, 2*2048**3, seconds), conv=_rate(conv, 2*32*32*32*128*128*9, seconds))

def _bench_net(config, bs, dev, ours, seconds, compile=False):
    "Train and sample images/s of one geometry: plain fp32, or this library's defaults"
    torch.manual_seed(0)
    net = UNet(**config).to(dev)
    if ours: net.to(memory_format=torch.channels_last)
    r, sched = replace(recipe('mnist_dpm', 'lesson'), batch=bs), Schedule.linear()
    x, t = torch.randn(bs, config['c'], config['size'], config['size'], device=dev).clamp(-1, 1), torch.full((bs,), 500, device=dev)
    flops, ema = _flops(net, x, t), EMA(net)
    if compile: net.compile()
    def data():
        while True: yield x, None
    steps = fit(lambda x0, y: denoising_loss(net, x0, sched), net.parameters(), data(), r, ema, amp=ours)
    sync = torch.cuda.synchronize if dev.type == 'cuda' else lambda: None
    def one(): next(steps); sync()
    def draw():
        with torch.no_grad(), torch.autocast(dev.type, torch.bfloat16, enabled=ours): net(x, t)
        sync()
    return dict(train=_rate(one, bs, seconds), forward=_rate(draw, bs, seconds), gflops_per_image=flops/1e9)

def _python(code): return json.loads(subprocess.run([sys.executable, '-c', 'import json,time; t0=time.perf_counter()\n' + code], capture_output=True, text=True, check=True).stdout.splitlines()[-1])

def bench_speed(
    seconds=5.,    # about this long for each number
    device=None,   # cpu or cuda
    compile=False, # also with torch.compile
) -> dict:         # numbers, ready for JSON
    "Speed, as ratios within one run: our defaults (bf16 autocast, channels_last) against plain fp32, and both against the machine's own peak"
    dev = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    out = dict(hardware=hardware(dev), versions=versions(), peak_gflops={str(d)[6:]: {k: v/1e9 for k, v in _peak(dev, d, seconds).items()} for d in (torch.float32, torch.bfloat16)})
    lesson = dict(c=1, size=28, **RECIPES['mnist_dpm', 'lesson'].net)
    for name, config, bs in ('mnist lesson', lesson, 64), ('celeba64 paper', dict(c=3, size=64, **RECIPES['celeba64_dpm', 'paper'].net), 4 if dev.type == 'cpu' else 128):
        row = dict(batch=bs, fp32=_bench_net(config, bs, dev, False, seconds), ours=_bench_net(config, bs, dev, True, seconds))
        if compile: row['compiled'] = _bench_net(config, bs, dev, True, seconds, True)
        row['train_ratio'], row['forward_ratio'] = (row['ours'][k]/row['fp32'][k] for k in ('train', 'forward'))
        for kind, dt in ('fp32', 'float32'), ('ours', 'bfloat16'):
            row[kind]['share_of_conv_peak'] = row[kind]['train']*3*row[kind]['gflops_per_image']/out['peak_gflops'][dt]['conv']
        out[name] = row
    out['seconds_to_first_sample'] = _python('from pdae_nb.files import load_run\nfrom pdae_nb.sample import sample\nimport torch\nr=load_run("mnist_dpm"); sample(r.dpm, torch.randn(1,1,28,28), r.sched, 50, clip=1.)\nprint(json.dumps(time.perf_counter()-t0))')
    out['import_seconds_beyond_torch'] = min(_python('import torch; t0=time.perf_counter()\nimport pdae_nb.sample\nprint(json.dumps(time.perf_counter()-t0))') for _ in range(3))
    return out

# %% commands
def cmd_train(
    name:str,           # run to train, `<data>_<what>`, e.g. mnist_dpm
    size:str=None,      # smoke, lesson or paper; else $PDAE_NB_SIZE, else lesson
    out:str=None,       # folder for checkpoints, samples, log and the run; else runs/NAME-SIZE
    steps:int=None,     # steps in all, instead of the recipe's
    seed:int=0,         # of weights, order, times and noise
    device:str=None,    # cpu or cuda; else the GPU if there is one
    compile:bool=False, # torch.compile the networks
    every:int=500,      # steps between checkpoints
):
    "Train a run, or go on with it: the same command resumes"
    r = recipe(name, size)
    r = replace(r, seed=seed, images=r.images if steps is None else steps*r.batch)
    path = train_run(name, r, out or Path('runs')/f'{name}-{size or os.environ.get("PDAE_NB_SIZE") or "lesson"}', device=device, compile=compile, every=every)
    return json.loads((path/'run.json').read_text())['result']

def cmd_sample(
    name:str,                   # a run of data/models, or the path of a run folder
    n:int=64,                   # images
    steps:int=50,               # steps
    solver:str='ddim',          # ddim, dpmpp or belm
    eta:float=0.,               # 0 is DDIM, 1 is DDPM
    seed:int=0,                 # of the noise
    out:str='out/samples.png',  # picture to write
    device:str=None,            # cpu or cuda; else the GPU if there is one
):
    "Draw images"
    if solver not in SOLVERS: raise ValueError(f'solver must be one of {", ".join(SOLVERS)}, got {solver!r}')
    run, net = _dpm(name, device); torch.manual_seed(seed)
    x = torch.cat([sample(net, o, run.sched, steps, eta, None if solver == 'belm' else 1., SOLVERS[solver]) for o in _noise(net, n, seed).split(64)])
    return dict(picture=str(_picture(x, out)), images=n, steps=steps, solver=solver, seed=seed)

def cmd_reconstruct(
    name:str,                          # a run of data/models, or the path of a run folder
    images:str=None,                   # a folder of your own images; else the test set of the run's data
    n:int=16,                          # images
    steps:int=100,                     # steps, up and down
    exact:bool=False,                  # O-BELM, which loses nothing but rounding, instead of DDIM
    out:str='out/reconstructions.png', # picture to write: originals over reconstructions
    device:str=None,                   # cpu or cuda; else the GPU if there is one
):
    "Invert images to noise and sample them back"
    run, net = _dpm(name, device)
    im = folder(images, net.config['size'], net.config['c']) if images else load_images(run.recipe['data'], 'test', net.config['size'])
    x0 = to_signed(im.x[:n]).to(next(net.parameters()).device)
    xT, back = round_trip(net, x0, run.sched, steps, exact)
    return dict(picture=str(_picture(_rows(x0, back), out)), images=len(x0), steps=steps, exact=exact, mse=(back - x0).square().mean().item()/4, xT_std=xT.std().item())

def cmd_evaluate(
    name:str,                # a run of data/models, or the path of a run folder
    n:int=1000,              # samples for the judge
    steps:int=50,            # DDIM steps
    judge:str='mnist_judge', # run with a classifier of such images; '' for none
    test_images:int=10_000,  # test images for the noise MSE
    out:str=None,            # JSON to write; else data/results/NAME/SIZE.json
    device:str=None,         # cpu or cuda; else the GPU if there is one
):
    "Judge a DPM: noise MSE on held-out images, round trips, an independent classifier"
    d = evaluate_dpm(name, n, steps, judge, test_images, device)
    return d | dict(written=_write_json(out or _results()/Path(name).name/'lesson.json', d))

def cmd_bench(
    seconds:float=5.,   # about this long for each number
    device:str=None,    # cpu or cuda; else the GPU if there is one
    compile:bool=False, # also with torch.compile
    out:str=None,       # JSON to write; else data/results/bench/DEVICE.json
):
    "Measure speed, as ratios within one run"
    d = bench_speed(seconds, device, compile)
    return d | dict(written=_write_json(out or _results()/'bench'/f'{"cpu" if "CPU" in d["hardware"] else d["hardware"].replace(" ", "-")}.json', d))

def cmd_demo(
    out:str='out', # folder for the pictures
    n:int=16,      # digits to take there and back
):
    "Sample, invert and reconstruct digits with the shipped model"
    out, rows, t0 = Path(out), [], time.time()
    run, net = _dpm('mnist_dpm')
    images = mnist_or_digits('test')
    say = lambda what, number, path, t: rows.append((what, number, f'{time.time() - t:.1f}', str(path)))
    say('load the model and the data', f'{sum(p.numel() for p in net.parameters())/1e6:.2f} M parameters, {run.about["images_seen"]:,} images seen', '', t0)
    t = time.time(); x = sample(net, _noise(net, 64, 0), run.sched, 50, clip=1.)
    say('64 digits sampled, DDIM, 50 steps', 'uncurated, seed 0', _picture(x, out/'samples.png', title='64 uncurated samples, DDIM, 50 steps'), t)
    x0 = to_signed(images.x[:n]).to(x)
    for exact, steps, name in (False, 100, 'DDIM'), (True, 50, 'O-BELM'):
        t = time.time(); xT, back = round_trip(net, x0, run.sched, steps, exact)
        path = _picture(_rows(x0, back), out/f'reconstructed_{name.lower()}.png', title=f'{n} test digits and, below, their reconstructions: {name}, {steps} steps up and down')
        if not exact: _picture(xT, out/'inverted.png', title=f'the noise x_T that {n} test digits come from')
        say(f'{n} test digits to noise and back, {name}, {steps} steps', f'largest pixel error {(back - x0).abs().max()*127.5:.3g} of 255, MSE {(back - x0).square().mean()/4:.2e} in [0,1]', path, t)
    width = [max(len(r[i]) for r in rows) for i in range(3)]
    for r in rows: print('  '.join(o.ljust(w) for o, w in zip(r[:2], width)), r[2].rjust(6), 's ', r[3])
    print(f'{time.time() - t0:.0f} s in all, on {hardware(next(net.parameters()).device)}')

# %% main
COMMANDS = dict(train=cmd_train, sample=cmd_sample, reconstruct=cmd_reconstruct, evaluate=cmd_evaluate, bench=cmd_bench, demo=cmd_demo)

def _usage():
    return 'usage: pdae COMMAND … [--debug]\n\n' + '\n'.join(f'  {k:12} {f.__doc__}' for k, f in COMMANDS.items()) + '\n\n`pdae COMMAND --help` lists what a command takes; --debug shows the traceback of an error.'

def main(
    argv=None, # words after `pdae`; None takes the shell's
) -> int:      # exit status: 0 only when the work is done
    "The `pdae` command"
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = '--debug' in argv
    words = [a for a in argv if a != '--debug']
    if not words or words[0] in ('-h', '--help'): print(_usage()); return 0 if words else 2
    if words[0] not in COMMANDS: print(f'pdae: no command {words[0]!r}; there are {", ".join(COMMANDS)}', file=sys.stderr); return 2
    f = COMMANDS[words[0]]
    args = vars(anno_parser(f, prog=f'pdae {words[0]}').parse_args(words[1:]))
    try: result = f(**{k: v for k, v in args.items() if k not in ('pdb', 'xtra')})
    except Stopped as e: print(f'pdae {words[0]}: {e}', file=sys.stderr); return 128 + e.signum
    except KeyboardInterrupt: return 130
    except Exception as e:
        if debug: raise
        print(f'pdae {words[0]}: {" ".join(str(e).split()) or type(e).__name__}', file=sys.stderr); return 1
    if result is not None: print(json.dumps(result, indent=1))
    return 0
