"""Metrics: the papers' numbers, closed forms, rank-deficient statistics, the cache of real statistics, misuse. Seconds, no data."""
import math, sys
from functools import partial
from types import ModuleType
import numpy as np
import pytest, torch
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from test_numerics import inp
from pdae_nb.data import Images
from pdae_nb.metrics import (Feats, Stats, at_hand, auroc, feature_distance, features, fid, frechet, frechet_inf, inception_feats, judge_feats, kid, lpips, lpips_feats, mmd, mse, ppl,
    psnr, reference_stats, ssim, stats)
from pdae_nb.train import Judge

def rand(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
def pixels(n, c=1, size=12, seed=0): return torch.randint(256, (n, c, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
def judge(seed=0): torch.manual_seed(seed); return Judge(ch=8).eval().requires_grad_(False)
X = (pixels(6).float()/127.5 - 1)

# ---- pairs of images
IM1 = inp('im1', [2, 3, 32, 32], 1); A = (IM1 + 1)/2; B = .9*A + .05 + .02*inp('im2', [2, 3, 32, 32], 1)

def test_fingerprints():
    np.testing.assert_allclose(ssim(2*A - 1, 2*B - 1), [.994301, .994391], atol=2e-6)
    np.testing.assert_allclose(mse(2*A - 1, 2*B - 1), [9.5528e-4, 9.5606e-4], rtol=2e-5)
    np.testing.assert_allclose(psnr(2*A - 1, 2*B - 1), -10*np.log10([9.5528e-4, 9.5606e-4]), atol=1e-3)

@pytest.mark.parametrize('size', [1, 5, 11, 40])
def test_a_constant_image_has_the_ssim_of_its_windows(size):
    a, b = .3, .6                                          # with zero padding a window sees a share s of the constant
    w = np.exp(-np.arange(-5, 6)**2/4.5); w /= w.sum()
    s = np.array([w[max(0, 5 - i):5 - i + size].sum() for i in range(size)]); s = np.outer(s, s)
    va, vb, cov = a*a*(s - s*s), b*b*(s - s*s), a*b*(s - s*s)
    want = ((2*a*b*s*s + 1e-4)*(2*cov + 9e-4)/((a*a*s*s + b*b*s*s + 1e-4)*(va + vb + 9e-4))).mean()
    got = ssim(*(torch.full((1, 2, size, size), 2*o - 1, dtype=torch.float64) for o in (a, b)))
    assert math.isclose(got.item(), want, abs_tol=1e-10)

def test_an_image_and_itself():
    assert (mse(X, X) == 0).all() and psnr(X, X).isinf().all() and torch.allclose(ssim(X, X), torch.ones(6), atol=1e-5)
    assert (lpips(X, X, judge_feats(judge())) == 0).all()

def test_one_number_per_image_whatever_the_batch():
    net, y = judge_feats(judge()), X.flip(0)
    for f in (mse, psnr, ssim, partial(lpips, net=net)):
        whole = f(X, y); assert whole.shape == (6,)
        torch.testing.assert_close(whole, torch.cat([f(X[i:i + 1], y[i:i + 1]) for i in range(6)]), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(whole, f(y, X), rtol=1e-4, atol=1e-6)

def test_half_precision_counts_in_float():
    for f in (mse, ssim): assert f(X.half(), X.half()).dtype == torch.float32

BAD = [(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), 'uint8'), (torch.zeros(2, 1, 8, 8, dtype=torch.int64), 'int64'), (np.zeros((2, 1, 8, 8)), 'ndarray'), (torch.zeros(1, 8, 8), 'B,C,H,W'),
       (torch.zeros(0, 1, 8, 8), 'B,C,H,W'), (torch.full((2, 1, 8, 8), math.nan), 'NaN'), (torch.full((2, 1, 8, 8), -math.inf), 'infinite'), (255*torch.ones(2, 1, 8, 8), r'\[-1,1\]')]

@pytest.mark.parametrize('f', [mse, psnr, ssim, partial(lpips, net=judge_feats(judge()))], ids=['mse', 'psnr', 'ssim', 'lpips'])
@pytest.mark.parametrize('bad, says', BAD, ids=[s for _, s in BAD])
def test_images_are_met_at_the_door(f, bad, says):
    with pytest.raises((TypeError, ValueError), match=says): f(bad, bad)
    with pytest.raises((TypeError, ValueError), match=says): f(torch.zeros(2, 1, 8, 8), bad)
    with pytest.raises(ValueError, match='one shape'): f(torch.zeros(2, 1, 8, 8), torch.zeros(1, 1, 8, 8))       # nothing is broadcast

# ---- networks and their names
def test_lpips_is_a_loss_too():
    x = torch.full((1, 1, 12, 12), -1.).requires_grad_()   # nothing in it: feature vectors of length 0 in a network without biases
    feature_distance(lambda x: [x + 1], x, torch.ones(1, 1, 12, 12)).sum().backward(); assert x.grad.isfinite().all()
    x = X.clone().requires_grad_(); lpips(x, X.flip(0), judge_feats(judge())).sum().backward(); assert x.grad.isfinite().all() and x.grad.abs().sum() > 0

def test_the_key_follows_weights_and_structure():
    keys = {judge_feats(j).key for j in (judge(0), judge(1), Judge(ch=12), Judge(c=3, ch=8))}
    assert len(keys) == 4 and judge_feats(judge(0)).key in keys
    j = judge(0); j.head.bias[3] += 1e-7; assert judge_feats(j).key != judge_feats(judge(0)).key

def test_features_of_datasets_and_of_samples_agree():
    net, u8 = judge_feats(judge()), pixels(7)
    torch.testing.assert_close(features(net, Images(u8), bs=3), features(net, u8.float()/127.5 - 1), rtol=1e-4, atol=1e-5)
    for bad in (u8, u8.numpy(), u8.float()):
        with pytest.raises((TypeError, ValueError)): features(net, bad)

def fake(monkeypatch, tmp_path, weights, **modules):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path)); (tmp_path/'hub/checkpoints').mkdir(parents=True)
    for w in weights: (tmp_path/'hub/checkpoints'/w).write_bytes(b'')
    for name, attrs in modules.items():
        m = ModuleType(name.replace('__', '.')); vars(m).update(attrs)
        monkeypatch.setitem(sys.modules, name.replace('__', '.'), m)

class FakeInception(torch.nn.Module):
    def __init__(self, name, wanted, feature_extractor_weights_path):
        super().__init__(); assert wanted == ['2048'] and feature_extractor_weights_path.endswith('6726825d.pth'); self.w = torch.nn.Parameter(torch.ones(1))
    def forward(self, x): assert x.dtype == torch.uint8 and x.shape[1] == 3; return x.float().mean((2, 3)),

def test_inception_when_at_hand(monkeypatch, tmp_path):
    fake(monkeypatch, tmp_path, ['weights-inception-2015-12-05-6726825d.pth'], torch_fidelity={}, torch_fidelity__feature_extractor_inceptionv3=dict(FeatureExtractorInceptionV3=FakeInception))
    f = at_hand(inception_feats, lambda: judge_feats(judge()))
    assert f.name == 'Inception' and f(X).shape == (6, 3) and f.key

def test_lpips_when_at_hand(monkeypatch, tmp_path):
    class Inner(torch.nn.Module):
        def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.ones(1))
        def forward(self, x, y): assert x.shape[1] == 3; return (x - y).square().mean((1, 2, 3), keepdim=True)
    class Net:
        def __init__(self, net_type): self.net = Inner()
    fake(monkeypatch, tmp_path, ['alexnet-owt-7be5be79.pth'], torchmetrics={}, torchmetrics__image={}, torchmetrics__image__lpip=dict(LearnedPerceptualImagePatchSimilarity=Net))
    net, x = lpips_feats(), X.repeat(1, 1, 3, 3)
    assert net.name == 'alex'; torch.testing.assert_close(lpips(x, x.flip(0), net), 4*mse(x, x.flip(0)))
    with pytest.raises(ValueError, match='at least 32x32'): lpips(X, X, net)
    with pytest.raises(TypeError, match='alex gives distances'): features(net, X)
    with pytest.raises(FileNotFoundError, match='LPIPS-vgg needs its weights .*vgg16-397923af.pth'): lpips_feats('vgg')

def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_fidelity', None); monkeypatch.setitem(sys.modules, 'torchmetrics', None)
    with pytest.raises(ImportError, match='torch-fidelity'): inception_feats()
    with pytest.raises(ImportError, match='torchmetrics'): lpips_feats()
    assert at_hand(inception_feats, lpips_feats, lambda: Feats('ours')).name == 'ours'

# ---- Fréchet
@pytest.mark.parametrize('d', [1, 2, 7, 60])
def test_frechet_closed_form(d):
    a = rand(d, d, seed=1); a = a @ a.T/d; f, shift = rand(4*d + 5, d) @ rand(d, d, seed=2), rand(d, seed=3)
    s, i = stats(f), torch.eye(d, dtype=torch.float64)
    want = (s.mean - s.mean @ a - shift).square().sum() + ((i - a) @ s.cov @ (i - a)).trace()
    np.testing.assert_allclose(frechet(f, f @ a + shift), want, rtol=1e-9)
    np.testing.assert_allclose(frechet(s, (s.mean @ a + shift, a @ s.cov @ a)), want, rtol=1e-6)
    np.testing.assert_allclose(frechet(f.numpy(), (f @ a + shift).numpy()), want, rtol=1e-9)

def test_frechet_is_the_matrix_square_root_where_that_exists():
    scipy_linalg = pytest.importorskip('scipy.linalg')
    f, g = rand(300, 12) @ rand(12, 12, seed=1), rand(200, 12, seed=2) + .3
    (m1, c1, _), (m2, c2, _) = stats(f), stats(g)
    want = (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2*np.trace(scipy_linalg.sqrtm((c1 @ c2).numpy()).real)
    np.testing.assert_allclose(frechet(f, g), want, rtol=1e-8)

@pytest.mark.parametrize('n', [2, 3, 30, 64, 65, 200])
@pytest.mark.parametrize('scale', [1e-6, 1., 1e6])
def test_frechet_of_few_images(n, scale):
    f, g = scale*rand(n, 64), scale*(rand(n, 64, seed=1) + .1)
    d = frechet(f, g); assert math.isfinite(d) and d > 0
    np.testing.assert_allclose(frechet(stats(f), stats(g)), d, rtol=1e-5)
    np.testing.assert_allclose(frechet(g, f), d, rtol=1e-9)
    assert 0 <= frechet(f, f) < 1e-10*scale**2*64 and 0 <= frechet(stats(f), stats(f)) < 1e-6*scale**2*64
    q = torch.linalg.qr(rand(64, 64, seed=2))[0]; np.testing.assert_allclose(frechet(f @ q + 5*scale, g @ q + 5*scale), d, rtol=1e-8)

def test_frechet_of_nearly_singular_covariances():
    q = torch.linalg.qr(rand(50, 50))[0]; lam, nu = torch.logspace(0, -18, 50, dtype=torch.float64), torch.logspace(-18, 0, 50, dtype=torch.float64)
    c1, c2 = q @ lam.diag() @ q.T, q @ nu.diag() @ q.T
    np.testing.assert_allclose(frechet((torch.zeros(50), c1), (torch.zeros(50), c2)), (lam.sqrt() - nu.sqrt()).square().sum(), rtol=1e-5)
    assert frechet((torch.zeros(50), c1), (torch.zeros(50), c1)) < 1e-12
    np.testing.assert_allclose(frechet((torch.zeros(50), 0*c1), (torch.ones(50), c1)), 50 + c1.trace(), rtol=1e-9)

BAD_F = [(rand(1, 4), 'at least 2'), (rand(4), 'N,D'), (rand(3, 4)*math.nan, 'NaN'), (rand(3, 4) + 1j, 'complex'), (torch.zeros(4, 0), 'N,D'), ((torch.zeros(4), torch.eye(3)), r'\(4,\) and \(3, 3\)'),
         ((torch.zeros(4), -torch.eye(4)), 'negative eigenvalues'), ((torch.zeros(4), math.nan*torch.eye(4)), 'NaN')]

@pytest.mark.parametrize('bad, says', BAD_F, ids=range(len(BAD_F)))
def test_features_are_met_at_the_door(bad, says):
    for pair in ((bad, rand(5, 4)), (rand(5, 4), bad)):
        with pytest.raises(ValueError, match=says): frechet(*pair)
    if torch.is_tensor(bad):
        for f in (stats, lambda f: mmd(f, rand(50, 4))):
            with pytest.raises(ValueError, match=says): f(bad)

def test_widths_must_agree():
    for f in (frechet, mmd):
        with pytest.raises(ValueError, match='one width, got 4 and 5'): f(rand(40, 4), rand(40, 5))

def test_the_bias_falls_as_one_over_n_and_extrapolation_takes_it_away():
    exact = torch.zeros(8), torch.eye(8)
    at = lambda n, f: np.mean([f(exact, rand(n, 8, seed=i)) for i in range(30)])
    np.testing.assert_allclose([at(n, frechet)*n for n in (200, 800)], 1.25*8 + .25*64, rtol=.1)
    inf = np.array([frechet_inf(exact, rand(800, 8, seed=i)) for i in range(60)])
    assert abs(inf.mean()) < 4*inf.std()/60**.5 < at(800, frechet)/2
    with pytest.raises(ValueError, match='16 images'): frechet_inf(exact, rand(9, 8))

# ---- KID
@pytest.mark.parametrize('n', [4, 40])
@pytest.mark.parametrize('shift, want', [(0, 0), (1, 22)]) # N(0,1) against N(1,1): moments differ by 1, 1, 4, the kernel makes 3 + 3 + 16
def test_kid_is_unbiased_at_any_n(n, shift, want):
    v = np.array([mmd(a, b + shift, 2)[0] for a, b in zip(rand(4000//n, n, 1), rand(4000//n, n + 1, 1, seed=1))])
    assert abs(v.mean() - want) < 4*v.std()/len(v)**.5 < 10

@pytest.mark.parametrize('shift', [0, .7])
def test_the_error_of_kid_is_honest(shift):
    v = np.array([mmd(a, b + shift) for a, b in zip(rand(60, 60, 5), rand(60, 80, 5, seed=1))])
    assert .7 < v[:, 1].mean()/v[:, 0].std() < 3

def test_kid_is_the_u_statistic_whatever_the_blocks():
    f, g = rand(40, 3), rand(30, 3, seed=1); k = lambda a, b: (a @ b.T/3 + 1)**3
    want = (k(f, f).sum() - k(f, f).trace())/(40*39) + (k(g, g).sum() - k(g, g).trace())/(30*29) - 2*k(f, g).mean()
    for blocks in (2, 7, 15): np.testing.assert_allclose(mmd(f, g, blocks)[0], want, rtol=1e-9)

def test_kid_of_images():
    net, u8 = judge_feats(judge()), pixels(40)
    assert kid(net, Images(u8), Images(pixels(30, seed=1)), blocks=3) == mmd(features(net, Images(u8)), features(net, Images(pixels(30, seed=1))), blocks=3)
    with pytest.raises(ValueError, match='10 blocks'): kid(net, X, X)
    with pytest.raises(TypeError, match='statistics'): mmd(stats(rand(40, 3)), rand(40, 3))

# ---- statistics of real images
@pytest.fixture
def cache(monkeypatch, tmp_path): monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path)); return tmp_path

def counted(net):
    seen = []
    return net._replace(embed=lambda x: seen.append(len(x)) or net.embed(x)), seen

def test_reference_statistics_are_made_once(cache):
    (net, seen), im = counted(judge_feats(judge())), Images(pixels(20))
    first, again = reference_stats(net, im), reference_stats(net, Images(im.x.clone()))
    assert seen == [20] and torch.equal(first.mean, again.mean) and torch.equal(first.cov, again.cov) and first.n == again.n == 20
    assert fid(net, first, im) < 1e-3 and [p.suffix for p in cache.iterdir()] == ['.safetensors']

def test_any_change_makes_new_statistics(cache):
    (net, seen), im = counted(judge_feats(judge())), Images(pixels(20))
    brighter = im.x.clone(); brighter[19, 0, 11, 11] ^= 1
    reference_stats(net, im)
    for f, i, crop in ((net, Images(brighter), ''), (net, im[range(19)], ''), (net, im, 'D2C'), (net._replace(key=judge_feats(judge(1)).key), im, ''), (net, Images(im.x.reshape(20, 1, 16, 9)), '')):
        before = len(seen); reference_stats(f, i, crop); reference_stats(f, i, crop); assert len(seen) == before + 1
    assert len(list(cache.iterdir())) == 6

def half(p): p.write_bytes(p.read_bytes()[:-100])
def flipped(p): b = bytearray(p.read_bytes()); b[-5] ^= 64; p.write_bytes(b)
def foreign(p): save_file(dict(a=torch.zeros(2)), p)
def poisoned(p): save_file(dict(mean=torch.zeros(32).double(), cov=math.nan*torch.eye(32).double()), p)

@pytest.mark.parametrize('damage', [half, flipped, foreign, poisoned, lambda p: p.write_bytes(b''), lambda p: p.write_bytes(b'no tensors here'*99)], ids=['half', 'flipped', 'foreign', 'poisoned', 'empty', 'text'])
def test_damaged_statistics_are_made_anew(cache, damage):
    (net, seen), im = counted(judge_feats(judge())), Images(pixels(20))
    first = reference_stats(net, im); damage(next(cache.iterdir()))
    again, third = reference_stats(net, im), reference_stats(net, im)
    assert len(seen) == 2 and torch.equal(first.cov, again.cov) and torch.equal(first.cov, third.cov)

def test_a_network_without_a_key_is_never_trusted(cache):
    net, seen = counted(Feats('mine', lambda x: x.flatten(1)[:, :5]))
    for _ in range(2): assert isinstance(reference_stats(net, Images(pixels(9))), Stats)
    assert len(seen) == 2 and not list(cache.iterdir())
    with pytest.raises(TypeError, match='expected Images, got Tensor'): reference_stats(net, X)

# ---- codes
def squares(a, b): return (a - b).square().flatten(1).sum(1)

@pytest.mark.parametrize('dtype, rtol', [(torch.float64, 1e-6), (torch.float32, .02)])
def test_ppl_is_a_speed(dtype, rtol):
    z1, z2 = rand(6, 2, 3, 3, dtype=dtype), rand(6, 2, 3, 3, seed=1, dtype=dtype)
    u1, u2 = (z/z.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for z in (z1, z2))
    np.testing.assert_allclose(ppl(lambda z: z, u1, u2, squares), (u1*u2).flatten(1).sum(1).acos()**2, rtol=rtol)
    lerp = lambda a, b, t: a.lerp(b, t.view(-1, 1, 1, 1))
    np.testing.assert_allclose(ppl(lambda z: 3*z, z1, z2, squares, path=lerp, t=torch.linspace(0, 1, 6)), 9*squares(z1, z2), rtol=rtol)

def test_ppl_of_codes_that_are_equal_or_opposite():
    z = rand(3, 5); assert (ppl(lambda z: z, z, z, squares) < 1e-12).all() and ppl(lambda z: z, z, -z, squares).isfinite().all()
    for bad in (z[:2], z.long()):
        with pytest.raises(ValueError, match='one shape'): ppl(lambda z: z, bad, z if bad.is_floating_point() else bad, squares)

@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('levels', [1, 3, 1e6])
def test_auroc_is_scikit_learns(seed, levels):
    s, y = (rand(200, seed=seed)*levels).round(), rand(200, seed=seed + 9) > .5
    assert math.isclose(auroc(s, y), roc_auc_score(y, s), abs_tol=1e-12) and math.isclose(auroc(-s, y) + auroc(s, y), 1, abs_tol=1e-12)

@pytest.mark.parametrize('s, y, says', [([1., 2.], [0, 0], '0 with and 2 without'), ([1., 2.], [1, 1], '2 with'), ([1., math.nan], [0, 1], '1 NaN'), ([1., 2.], [0, 2], r'labels \[0, 2\]'), ([1., 2.], [0], r'\(2,\) and \(1,\)'), ([], [], 'both labels')])
def test_auroc_wants_both_kinds(s, y, says):
    with pytest.raises(ValueError, match=says): auroc(s, y)
