"""Published checkpoints: networks built from names and shapes give the published numbers, files of every format go in and out, hostile ones do nothing"""
import io, os, pickle, zipfile
import numpy as np
import pytest, torch

from pdae_nb.model import load_run
from pdae_nb.forward import Schedule
from pdae_nb.methods.latent import MLPSkipNet
from pdae_nb.methods.pdae import ConvEncoder, GradientEstimator, pdae_loss
from pdae_nb.hub import decoder_of, reconstruct
from pdae_nb.methods.diffae import SemanticEncoder
from pdae_nb.pretrained import as_run, convert, from_official, load_dpm, load_official, to_official
from pdae_nb.hub import push_run
from pdae_nb.adapters import read_official

from pdae_nb.unet import UNet
from test_numerics import SCHED, fingerprint, inp, official_names, u

quiet = dict(log=lambda s: None)

# ---- names and shapes from the published tables, weights from the deterministic fill
def state_of(net):
    "Official name -> tensor in the official layout, filled as the published fingerprints were"
    keys, out = [f'{n}.{s}' for n in official_names(net) for s in ('weight', 'bias')], {}
    for k, v in zip(keys, net.state_dict().values(), strict=True):
        w, n = u(k, v.numel()), v.numel()
        w = (2*w - 1)*np.sqrt(3*len(v)/n) if v.ndim > 1 else .5 + w if k.endswith('weight') else .2*(2*w - 1)
        shape = v.shape[:3] if k.endswith(('qkv.weight', 'proj_out.weight')) else (*v.shape, 1, 1) if k == 'encoder.out.3.weight' else v.shape
        out[k] = torch.from_numpy(w).reshape(shape).float()
    return out

X, T = inp('x', [2, 3, 32, 32], 1), torch.tensor([8, 614])          # their 7 and 613
small = dict(c=3, ch=32, mult=(1, 2, 3), size=32, attn=(16,))

@pytest.mark.parametrize('hints, want', [
    (dict(heads=1), [.00864899, .448099, -.304033, -.169668, .423158, -.133011, .0911598, .173675]),
    (dict(heads=4), [.00796018, .446576, -.233284, -.107622, .474691, -.218734, .0925067, .15607]),
    (dict(heads=4, new_order=True), [.00906511, .447228, -.210317, -.0394762, .532006, -.0487052, .170024, .165108])])
def test_unet(hints, want):
    parts = from_official(state_of(UNet(**small)), size=32, **hints)
    assert list(parts) == ['dpm'] and sum(p.numel() for p in parts['dpm'].parameters()) == 2_885_827
    with torch.no_grad(): np.testing.assert_allclose(fingerprint(parts['dpm'](X, T)), want, atol=1e-4)

def test_shift_unet():
    G = from_official(state_of(GradientEstimator(UNet(**small), 16)), size=32)['G']
    with torch.no_grad(): eps, g = G(X, T, inp('z', [2, 16], 1.5))
    np.testing.assert_allclose(fingerprint(eps), [.00864899, .448099, -.304033, -.169668, .423158, -.133011, .0911598, .173675], atol=1e-4)
    np.testing.assert_allclose(fingerprint(g), [-.244022, .514594, .269737, .0804855, -.323166, -.190722, .196672, .235316], atol=1e-4)

@pytest.mark.parametrize('size, want', [(128, [-.0361562, .502284, .283429, -.235663, -.485897, -.0508718, .265137, -.43104]), (64, [-.0238055, .501968, .422983, .193701, -.467484, -.348888, -.0205151, -.206516])])
def test_pdae_encoder(size, want):
    enc = from_official(state_of(ConvEncoder(3, size)))['enc']
    assert enc.config['size'] == size
    with torch.no_grad(): np.testing.assert_allclose(fingerprint(enc(inp(f'x{size}', [1, 3, size, size], 1))), want, atol=1e-4)

def test_diffae_autoencoder():
    state = state_of(SemanticEncoder(3, 32, (1, 2, 2), 32, 64, (16,))) | state_of(UNet(c=3, ch=32, mult=(1, 2), size=32, dz=64, attn=(16,), dt=64, z_shift=False))
    run = from_official(state, size=32); x0 = inp('x0', [2, 3, 32, 32], 1)
    assert sum(p.numel() for m in run.values() for p in m.parameters()) == 1_420_259
    with torch.no_grad(): z = run['enc'](x0); own, given = run['unet'](X, T, z), run['unet'](X, T, inp('z', [2, 64], 1.5))
    np.testing.assert_allclose(fingerprint(z), [-.0526045, .334231, -.15551, .241757, -.401154, -.0561932, .0693927, .390651], atol=1e-4)
    np.testing.assert_allclose(fingerprint(own), [.0155462, .451765, -.1358, -.0761019, .219588, .483503, .235028, .291843], atol=1e-4)
    np.testing.assert_allclose(fingerprint(given), [.0118432, .454347, .0743938, .156425, .133836, -.00374633, -.0308769, .0984921], atol=1e-4)

def test_latent_net_with_its_alias():
    state = state_of(MLPSkipNet(16, 32, 4)); state |= {k.replace('linear_emb', 'cond_layers.1'): v for k, v in state.items() if 'linear_emb' in k}
    net = from_official(state)['net']
    with torch.no_grad(): np.testing.assert_allclose(fingerprint(net(inp('zlat', [2, 16], 1), T)), [-.0481797, .626398, .539364, -.0566622, .407236, -1.90817, .47236, .0128114], atol=1e-4)

def test_the_librarys_names_are_the_published_ones():
    for net in (UNet(**small), GradientEstimator(UNet(**small), 16), ConvEncoder(3, 64), SemanticEncoder(3, 32, (1, 2, 2), 32, 64, (16,)), UNet(c=3, ch=32, mult=(1, 2), size=32, dz=64, dt=64, z_shift=False)):
        mine, theirs = to_official(net), state_of(net)
        assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}

@pytest.mark.parametrize('change, said', [
    (lambda s: s.pop('out.2.bias'), r'1 tensors are missing \(out.2.bias\) and 0 are left over'), (lambda s: s.update(stray=torch.zeros(1)), r'0 tensors are missing \(\) and 1 are left over \(stray\)'),
    (lambda s: s.update({'out.0.weight': torch.zeros(3)}), 'has shape'), (lambda s: s['out.0.weight'].fill_(float('nan')), '32 of 32 numbers of up.out.0.weight are NaN'), (lambda s: s.update({'input_blocks.0.0.weight': torch.zeros(16, 3, 3, 3)}), 'no multiples'),
    (lambda s: [s.pop(k) for k in list(s) if k.startswith('input_blocks.2.')], 'no whole number of levels'), (lambda s: s.update({'input_blocks.1.0.emb_layers.1.weight': torch.zeros(32, 128)}), 'adds the time instead of scaling')])
def test_what_does_not_fit_is_named(change, said):
    state = state_of(UNet(**small)); change(state)
    with pytest.raises(ValueError, match=said): from_official(state, size=32)

# ---- formats
class ModelCheckpoint: pass
ModelCheckpoint.__module__ = 'pytorch_lightning.callbacks.model_checkpoint'

def lightning(d, path, monkeypatch):
    import sys, types
    names = ModelCheckpoint.__module__.split('.')
    with monkeypatch.context() as m:
        for i in range(3): m.setitem(sys.modules, '.'.join(names[:i + 1]), types.ModuleType('.'.join(names[:i + 1])))
        sys.modules[ModelCheckpoint.__module__].ModelCheckpoint = ModelCheckpoint
        torch.save({'epoch': 1, 'global_step': 11, 'pytorch-lightning_version': '1.4.5', 'callbacks': {ModelCheckpoint: dict(best_model_score=None)}, 'optimizer_states': [], 'lr_schedulers': [], **d}, path)

def test_pdae_at_its_real_size(tmp_path):
    "FFHQ-128: 177 M weights in half precision, by the published names and counts, in and out"
    with torch.device('meta'): G, enc = GradientEstimator(UNet(c=3, ch=128, mult=(1, 1, 2, 3, 4), size=128, attn=(16,)), 512), ConvEncoder(3, 128)
    names = lambda net: {k: (torch.rand(v.shape)*.02).half() for k, v in to_official(net).items()}
    g, e = names(G), names(enc); assert (len(g), len(e)) == (744, 28) and sum(v.numel() for v in g.values()) == 177_140_870
    assert sum(v.numel() for k, v in g.items() if k.startswith(('shift_', 'label_emb'))) == 78_522_371
    torch.save(dict(step=500_000, ema_encoder=e, ema_decoder=g), tmp_path/'checkpoint.pt')
    run = load_official(tmp_path/'checkpoint.pt', **quiet)
    assert run.G.dpm.config['attn'] == (16,) and run.G.dpm.config['size'] == 128 and run.enc.config['heads'] == 4 and run.about['steps'] == 500_000
    back = to_official(run.G); assert all(torch.equal(back[k], v.float()) for k, v in g.items())

def test_diffae_files(tmp_path, monkeypatch):
    enc, unet, net = SemanticEncoder(3, 32, (1, 2, 2), 32, 64, (16,)), UNet(c=3, ch=32, mult=(1, 2), size=32, dz=64, attn=(16,), dt=64, z_shift=False), MLPSkipNet(64, 32, 3)
    auto, stats = state_of(unet) | state_of(enc), dict(conds_mean=torch.randn(1, 64), conds_std=torch.rand(1, 64) + .5)
    both = {f'ema_model.{k}': v for k, v in auto.items()} | {f'model.{k}': torch.zeros_like(v) for k, v in auto.items()} | dict(x_T=torch.zeros(32, 3, 32, 32))
    lightning(dict(state_dict=both, hyper_parameters=dict(model_conf=dict(image_size=32, num_heads=1))), tmp_path/'last.ckpt', monkeypatch)
    with pytest.raises(pickle.UnpicklingError): torch.load(tmp_path/'last.ckpt', weights_only=True)
    run = load_official(tmp_path/'last.ckpt')
    back = to_official(run.unet) | to_official(run.enc); assert all(torch.equal(back[k], v) for k, v in auto.items())             # the average, not the raw zeros
    lightning(dict(state_dict=both | stats | {f'ema_model.latent_net.{k}': v for k, v in state_of(net).items()}, hyper_parameters=dict(model_conf=dict(image_size=32))), tmp_path/'latent.ckpt', monkeypatch)
    said = convert(str(tmp_path/'latent.ckpt'), str(tmp_path/'runs/faces_diffae_latent'), base='faces_diffae'); convert(str(tmp_path/'latent.ckpt'), str(tmp_path/'runs/faces_diffae'), 'autoencoder', data='faces')
    latent, base = load_run(tmp_path/'runs/faces_diffae_latent'), load_run(tmp_path/'runs/faces_diffae'); assert set(said['parts']) == {'net', 'stats'} and torch.equal(latent.stats.mean, stats['conds_mean'][0])
    from pdae_nb.edit import draw
    assert draw(latent, base, torch.randn(2, 3, 32, 32), 2, z_steps=2).shape == (2, 3, 32, 32)

def test_a_converted_pdae_is_a_run(tmp_path):
    G, enc = GradientEstimator(UNet(c=1, ch=8, mult=(1, 2), size=28, n_res=1, groups=8), 6), ConvEncoder(1, 28, 6, groups=8)
    torch.save(dict(ema_encoder=state_of(enc), ema_decoder=state_of(G)), tmp_path/'c.pt')
    convert(str(tmp_path/'c.pt'), str(tmp_path/'mine_pdae'), size=28, groups=8)
    with pytest.raises(ValueError, match='is there already'): convert(str(tmp_path/'c.pt'), str(tmp_path), size=28)
    run = load_run(tmp_path/'mine_pdae'); x0, t = torch.rand(2, 1, 28, 28)*2 - 1, torch.tensor([2, 700])
    fill_like = from_official(state_of(G), size=28, groups=8, lag=0)['G']
    with torch.no_grad(): a, b = run.G(x0, t, run.enc(x0)), fill_like(x0, t - 1, run.enc(x0)); assert torch.allclose(a[0], b[0], atol=1e-5) and torch.allclose(a[1], b[1], atol=1e-5) and b[1].any()
    seen, back = reconstruct(x0, run, 2); assert torch.equal(seen, x0) and not torch.equal(back, x0) and torch.isfinite(pdae_loss(run.enc, run.G, x0, run.sched))

@pytest.mark.parametrize('kind, make, want', [('.pt', lambda n: dict(step=3, denoise_fn=n, ema_denoise_fn=n), 'dpm'), ('.pt', lambda n: n, 'dpm'), ('.safetensors', lambda n: n, 'dpm'), ('.pt', lambda n: dict(denoise_fn=n), 'dpm')])
def test_files_of_a_dpm(tmp_path, kind, make, want):
    from safetensors.torch import save_file
    net, said = UNet(**small), []; (save_file if kind == '.safetensors' else torch.save)(make(state_of(net)), tmp_path/f'f{kind}'); run = load_official(tmp_path/f'f{kind}', size=32, log=said.append)
    assert run.about['parts'] == [want] and ('no averaged weights' in ' '.join(said)) == (make(dict(a=1)) == dict(denoise_fn=dict(a=1))) and any('heads' in o for o in said) and any('noise table' in o for o in said)
    with torch.no_grad(): np.testing.assert_allclose(fingerprint(run.dpm(X, T)), [.00864899, .448099, -.304033, -.169668, .423158, -.133011, .0911598, .173675], atol=1e-4)

def test_statistics_and_heads(tmp_path):
    torch.save(dict(mean=torch.arange(16.), std=torch.arange(1., 17.)), tmp_path/'stats.pt'); torch.save(dict(ema_latent_denoise_fn=state_of(MLPSkipNet(16, 32, 3))), tmp_path/'net.pt')
    run = load_official(tmp_path/'net.pt', stats=tmp_path/'stats.pt', **quiet); assert torch.equal(run.stats.std, torch.arange(1., 17.)) and torch.equal(run.stats.denorm(torch.zeros(1, 16))[0], torch.arange(16.))
    torch.save(dict(ema_classifier=dict(weight=torch.eye(3, 16), bias=torch.zeros(3))), tmp_path/'cls.pt'); head = load_official(tmp_path/'cls.pt', **quiet).head
    assert torch.equal(head.probe(1, run.stats).w, torch.eye(3, 16)[1])
    with pytest.raises(ValueError, match='no mean and standard deviation'): load_official(tmp_path/'net.pt', stats=tmp_path/'cls.pt', **quiet)

# ---- hostile files
class Runs:
    def __init__(self, mark): self.mark = str(mark)
    def __reduce__(self): return os.system, (f'touch {self.mark}',)
class Evals:
    def __init__(self, mark): self.mark = str(mark)
    def __reduce__(self): return eval, (f'open({self.mark!r}, "w")',)
class Lookalike:
    def __reduce__(self): return ModelCheckpoint, ()
class Setter:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return torch._utils._rebuild_tensor_v2, (Runs(self.mark), 0, (1,), (1,), False, {})

def saved(o, **kw): b = io.BytesIO(); torch.save(o, b, **kw); return b.getvalue()

def repacked(b, compress=zipfile.ZIP_STORED, twice=False, grow=0):
    "The same archive, written another way"
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(b)) as a, zipfile.ZipFile(out, 'w', compress) as z:
        for m in a.infolist(): z.writestr(m.filename, a.read(m) + b'\0'*grow)
        if twice: z.writestr(a.infolist()[0].filename, b'x')
    return out.getvalue()

@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('make', [Runs, Evals, Setter])
@pytest.mark.parametrize('nest', [lambda o: o, lambda o: dict(state_dict=dict(a=torch.zeros(1), b=o)), lambda o: {'callbacks': {'x': [[(o,)]]}}, lambda o: {o: 1} if o.__hash__ else o])
def test_nothing_in_a_file_is_called(tmp_path, legacy, make, nest):
    mark = tmp_path/'it_ran'; (tmp_path/'f.ckpt').write_bytes(saved(nest(make(mark)), _use_new_zipfile_serialization=not legacy))
    with pytest.raises(ValueError, match='cannot be read safely'): load_official(tmp_path/'f.ckpt')
    assert not mark.exists()

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('data, said', [
    (pickle.dumps(Runs('nowhere')), 'cannot be read safely'), (repacked(saved(dict(a=torch.zeros(9))), zipfile.ZIP_DEFLATED), 'is compressed'), (repacked(saved(dict(a=torch.zeros(9))), twice=True), 'two members of one name'),
    (saved(dict(a=torch.zeros(999)))[:-100], 'cannot be read safely'), (saved(dict(a=torch.zeros(999)))[:50], 'cannot be read safely'), (saved(dict(a=torch.zeros(999)), _use_new_zipfile_serialization=False)[:-100], 'cannot be read safely'),
    (b'', 'cannot be read safely'), (b'PK\3\4' + b'\0'*99, 'cannot be read safely'), (saved([torch.zeros(3)]), 'holds a list'), (saved(torch.zeros(3)), 'holds a Tensor')])
def test_damaged_and_hostile_archives(tmp_path, data, said):
    (tmp_path/'f.pt').write_bytes(data)
    with pytest.raises(ValueError, match=said): load_official(tmp_path/'f.pt')

def test_bombs(tmp_path):
    laughs = [torch.zeros(1)]
    for _ in range(60): laughs = [laughs]*8                                                                # 8^60 ways to one tensor
    torch.save(dict(state_dict=dict(a=laughs)), tmp_path/'laughs.pt')
    with pytest.raises(ValueError, match='none of the networks|no weights'): load_official(tmp_path/'laughs.pt', **quiet)
    with zipfile.ZipFile(tmp_path/'zip.pt', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('archive/data.pkl', bytes(10**8))
    assert (tmp_path/'zip.pt').stat().st_size < 200_000
    with pytest.raises(ValueError, match='is compressed'): load_official(tmp_path/'zip.pt')
    b = bytearray(saved(dict(a=torch.zeros(9)))); i = b.rfind(b'PK\1\2'); b[i + 24:i + 28] = (2**31).to_bytes(4, 'little'); (tmp_path/'liar.pt').write_bytes(b)     # a member that claims 2 GiB
    with pytest.raises(ValueError, match='claims to hold'): load_official(tmp_path/'liar.pt')
    state = state_of(UNet(**small)); state['out.2.bias'] = torch.zeros(1).expand(10**12); torch.save(state, tmp_path/'stride.pt'); torch.save(dict(mean=torch.zeros(1).expand(10**10), std=torch.ones(1).expand(10**10)), tmp_path/'stats.pt')
    for f in ('stride', 'stats'):
        with pytest.raises(ValueError, match='bytes in a file of'): load_official(tmp_path/f'{f}.pt')
    for shape in ((10**5, 1), (10**6, 0)):         # honest about its bytes, and asks for a network of many gigabytes
        torch.save({f'layers.{i}.linear.weight': torch.zeros(shape) for i in range(3)}, tmp_path/'wide.pt')
        with pytest.raises(ValueError, match='are missing'): load_official(tmp_path/'wide.pt', **quiet)
    (tmp_path/'tail.pt').write_bytes((tmp_path/'zip.pt').read_bytes() + b'PK\5\6')                          # torch would unpack it, zipfile does not see an archive
    with pytest.raises(ValueError, match='cannot be read safely'): load_official(tmp_path/'tail.pt')
    (tmp_path/'array.pt').write_bytes(b'\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.')
    with pytest.raises(ValueError, match='it wants __builtin__.bytearray'): load_official(tmp_path/'array.pt')

def test_a_lookalike_class_builds_nothing(tmp_path, monkeypatch):
    lightning(dict(state_dict={}, extra=Lookalike()), tmp_path/'f.ckpt', monkeypatch)
    d = None
    try: d = read_official(tmp_path/'f.ckpt')
    except ValueError: pass
    assert d is None or type(d['extra']).__name__ == '_Callback' and not vars(d['extra'])

# ---- diffusers
@pytest.fixture(scope='module')
def unet2d():
    diffusers = pytest.importorskip('diffusers'); torch.manual_seed(0)
    return diffusers.UNet2DModel(sample_size=32, in_channels=3, out_channels=3, block_out_channels=(16, 32, 32), layers_per_block=2, norm_num_groups=8, attention_head_dim=8,
        down_block_types=('DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D'), up_block_types=('UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D')).eval()

@pytest.mark.parametrize('safe', [True, False])
@pytest.mark.parametrize('pipe', [True, False])
def test_a_diffusers_folder(unet2d, tmp_path, safe, pipe):
    import diffusers
    unet2d.save_pretrained(tmp_path/('unet' if pipe else '.'), safe_serialization=safe); diffusers.DDPMScheduler(1000, beta_schedule='squaredcos_cap_v2').save_pretrained(tmp_path/('scheduler' if pipe else '.'))
    run = load_dpm(tmp_path, **quiet); x, t = torch.randn(2, 3, 32, 32), torch.tensor([1, 1000])
    with torch.no_grad(): assert torch.allclose(run.dpm(x, t), unet2d(x, t - 1).sample, atol=1e-5)
    np.testing.assert_allclose(run.sched.alpha_bar, Schedule.cosine().alpha_bar, atol=1e-4); assert not any(p.requires_grad for p in run.dpm.parameters())

def test_nan_in_a_diffusers_model(unet2d, tmp_path):
    import copy
    bad = copy.deepcopy(unet2d); bad.conv_in.bias.data[3] = float('nan'); bad.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='conv_in.bias holds numbers that are NaN'): load_dpm(tmp_path, **quiet)
    with pytest.raises(ValueError, match='in_memory: conv_in.bias holds'): load_dpm(bad, **quiet)

def test_pdae_trains_on_it(unet2d, tmp_path):
    from pdae_nb.adapters import DiffusersUNet
    torch.manual_seed(0); dpm = load_dpm(unet2d).dpm; before = {k: v.clone() for k, v in dpm.state_dict().items()}
    enc, G = ConvEncoder(3, 32, 8, groups=8), GradientEstimator(dpm, 8).train(); opt = torch.optim.Adam([*enc.parameters(), *(p for p in G.parameters() if p.requires_grad)], 3e-3)
    x0, t, eps = inp('d', [4, 3, 32, 32], 1), torch.tensor([50, 300, 600, 900]), inp('e', [4, 3, 32, 32], 1.7); losses = []
    for _ in range(12): opt.zero_grad(); loss = pdae_loss(enc, G, x0, SCHED, t=t, eps=eps); loss.backward(); opt.step(); losses.append(loss.item())
    assert losses[-1] < .98*losses[0] and all(torch.equal(v, before[k]) for k, v in dpm.state_dict().items())
    from pdae_nb.model import save_run
    save_run(tmp_path/'guest_pdae', dict(enc=enc, G=G, dpm=dpm), SCHED, {}, torch.float32); run = load_run(tmp_path/'guest_pdae'); assert isinstance(run.dpm, DiffusersUNet) and run.dpm is run.G.dpm
    with torch.no_grad(): assert torch.allclose(decoder_of(run, x0)(x0, t), decoder_of(type('R', (), dict(enc=enc.eval(), G=G.eval(), dpm=dpm, sched=SCHED, about=dict(parts=[])))(), x0)(x0, t), atol=1e-5)

def test_the_shell_takes_a_foreign_dpm(unet2d, tmp_path, monkeypatch, capsys):
    from pdae_nb.cli import main
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path/'cache')); unet2d.save_pretrained(tmp_path/'theirs')
    assert main(['convert', str(tmp_path/'theirs'), str(tmp_path/'runs/theirs_dpm')]) == 0 and 'DiffusersUNet' in capsys.readouterr().out
    assert load_run(tmp_path/'runs/theirs_dpm').dpm.config['size'] == 32
    with pytest.raises(FileNotFoundError, match='no run'): as_run('nowhere_dpm')

# ---- the Hub
class StandIn:
    "Keeps what it is given as the Hub's cache would"
    def __init__(self, root): self.root = root
    def create_repo(self, repo, exist_ok): self.at = self.root/f'models--{repo.replace("/", "--")}'; (self.at/'snapshots/0').mkdir(parents=True); (self.at/'refs').mkdir(); (self.at/'refs/main').write_text('0')
    def upload_file(self, path_or_fileobj, path_in_repo, repo_id): (self.at/'snapshots/0'/path_in_repo).write_bytes(open(path_or_fileobj, 'rb').read())
    def upload_folder(self, folder_path, repo_id, allow_patterns):
        from pathlib import Path
        for k in allow_patterns:
            for f in Path(folder_path).glob(k): (self.at/'snapshots/0'/f.name).write_bytes(f.read_bytes())

def test_a_run_travels_over_the_hub(tmp_path, monkeypatch):
    import huggingface_hub.constants as hub
    monkeypatch.setattr(hub, 'HF_HUB_CACHE', str(tmp_path)); monkeypatch.setattr(hub, 'HF_HUB_OFFLINE', True); api = StandIn(tmp_path)
    push_run('mnist_pdae', 'someone/digits-pdae', api=api); text = (api.at/'snapshots/0/README.md').read_text()
    for o in ('license: apache-2.0', 'mnist', '256,000 images', f"{load_run('mnist_pdae').about['result']['test_noise_mse']:.4g}", 'PDAE', "load_run('someone/digits-pdae')"): assert o in text
    here, there = load_run('mnist_pdae'), load_run('someone/digits-pdae')
    for k, v in here.G.state_dict().items(): assert torch.equal(v, there.G.state_dict()[k])
    with pytest.raises(FileNotFoundError, match='the Hub did not give it either'): load_run('someone/nothing')
    with pytest.raises(ValueError, match='user/name'): push_run('mnist_pdae', 'digits', api=api)
