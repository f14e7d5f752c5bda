"""The metrics: published numbers, closed forms, few images, cached statistics, bad input.

No data set is needed.
"""

import math
import sys
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from test_numerics import inp

from pdae_nb.data import Images
from pdae_nb.files import read_tensors, write_tensors
from pdae_nb.methods.classifier import EvalClassifier, EvalClassifierNet
from pdae_nb.metrics import (
    Feats,
    Stats,
    at_hand,
    auroc,
    eval_feats,
    feature_distance,
    features,
    fid,
    frechet,
    frechet_inf,
    inception_feats,
    kid,
    lpips,
    lpips_feats,
    mmd,
    mse,
    ppl,
    psnr,
    reference_stats,
    ssim,
    stats,
)


def rand(*shape, seed=0, dtype=torch.float64):
    "Standard normal numbers, sampled in float64."
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def pixels(n, c=1, size=12, seed=0):
    "Random uint8 images: (n,c,size,size)."
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, c, size, size), generator=generator, dtype=torch.uint8)


def classifier(seed=0, c=1, ch=8):
    "A small evaluation classifier with random weights."
    torch.manual_seed(seed)
    net = EvalClassifierNet(c=c, ch=ch).eval().requires_grad_(False)
    return EvalClassifier(net, (c, 12, 12))


X = pixels(6).float() / 127.5 - 1

# ---------------------------------------------------------------- pairs of images

FIRST = (inp('im1', [2, 3, 32, 32], 1) + 1) / 2  # in [0,1]
SECOND = 0.9 * FIRST + 0.05 + 0.02 * inp('im2', [2, 3, 32, 32], 1)
PUBLISHED_MSE = [9.5528e-4, 9.5606e-4]


def test_published_numbers_of_mse_psnr_and_ssim():
    x = 2 * FIRST - 1
    y = 2 * SECOND - 1
    np.testing.assert_allclose(ssim(x, y), [0.994301, 0.994391], atol=2e-6)
    np.testing.assert_allclose(mse(x, y), PUBLISHED_MSE, rtol=2e-5)
    np.testing.assert_allclose(psnr(x, y), -10 * np.log10(PUBLISHED_MSE), atol=1e-3)


def window_shares(size):
    "Share of the 11×11 Gaussian window around each pixel that is inside the image: (size,size)."
    w = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    w /= w.sum()
    shares = [w[max(0, 5 - i) : 5 - i + size].sum() for i in range(size)]
    return np.outer(shares, shares)


@pytest.mark.parametrize('size', [1, 5, 11, 40])
def test_ssim_of_constant_images_in_closed_form(size):
    a = 0.3
    b = 0.6
    s = window_shares(size)  # zero padding: the mean in a window is s times the constant
    spread = s - s * s
    numerator = (2 * a * b * s * s + 1e-4) * (2 * a * b * spread + 9e-4)
    denominator = (a * a * s * s + b * b * s * s + 1e-4) * (a * a * spread + b * b * spread + 9e-4)
    x = torch.full((1, 2, size, size), 2 * a - 1, dtype=torch.float64)
    y = torch.full((1, 2, size, size), 2 * b - 1, dtype=torch.float64)
    want = (numerator / denominator).mean()
    assert math.isclose(ssim(x, y).item(), want, abs_tol=1e-10)


def test_an_image_compared_with_itself():
    assert (mse(X, X) == 0).all()
    assert (psnr(X, X) == math.inf).all()
    assert torch.allclose(ssim(X, X), torch.ones(6), atol=1e-5)
    assert (lpips(X, X, eval_feats(classifier())) == 0).all()


IMAGE_METRICS = dict(
    mse=mse, psnr=psnr, ssim=ssim, lpips=partial(lpips, net=eval_feats(classifier()))
)
each_image_metric = pytest.mark.parametrize(
    'metric', IMAGE_METRICS.values(), ids=IMAGE_METRICS.keys()
)


@each_image_metric
def test_number_of_an_image_is_independent_of_the_batch_and_symmetric(metric):
    y = X.flip(0)
    whole = metric(X, y)
    assert whole.shape == (6,)
    single = torch.cat([metric(X[i : i + 1], y[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(whole, single, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(whole, metric(y, X), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('metric', [mse, ssim])
def test_half_precision_images_are_compared_in_float32(metric):
    assert metric(X.half(), X.half()).dtype == torch.float32


BAD_IMAGES = [
    ('uint8', torch.zeros(2, 1, 8, 8, dtype=torch.uint8)),
    ('int64', torch.zeros(2, 1, 8, 8, dtype=torch.int64)),
    ('ndarray', np.zeros((2, 1, 8, 8))),
    ('B,C,H,W', torch.zeros(1, 8, 8)),
    ('B,C,H,W', torch.zeros(0, 1, 8, 8)),
    ('NaN', torch.full((2, 1, 8, 8), math.nan)),
    ('infinite', torch.full((2, 1, 8, 8), -math.inf)),
    (r'\[-1,1\]', 255 * torch.ones(2, 1, 8, 8)),
]


@each_image_metric
@pytest.mark.parametrize('message, bad', BAD_IMAGES)
def test_bad_images_are_named(metric, bad, message):
    good = torch.zeros(2, 1, 8, 8)
    for x, y in ((bad, bad), (bad, good), (good, bad)):
        with pytest.raises((TypeError, ValueError), match=message):
            metric(x, y)


@each_image_metric
def test_batches_of_images_are_not_broadcast(metric):
    with pytest.raises(ValueError, match='one shape'):
        metric(torch.zeros(2, 1, 8, 8), torch.zeros(1, 1, 8, 8))


# ---------------------------------------------------------------- feature networks


def test_feature_distance_has_a_finite_gradient_at_features_of_length_0():
    def maps(x):
        return [x + 1]

    x = torch.full((1, 1, 12, 12), -1.0).requires_grad_()
    feature_distance(maps, x, torch.ones(1, 1, 12, 12)).sum().backward()
    assert x.grad.isfinite().all()


def test_lpips_has_a_gradient():
    x = X.clone().requires_grad_()
    lpips(x, X.flip(0), eval_feats(classifier())).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


def test_key_depends_on_weights_and_structure_alone():
    models = [classifier(0), classifier(1), classifier(ch=12), classifier(c=3)]
    keys = {eval_feats(model).key for model in models}
    assert len(keys) == 4
    assert eval_feats(classifier(0)).key in keys
    changed = classifier(0)
    changed.net.head.bias[3] += 1e-7
    assert eval_feats(changed).key not in keys


def test_features_have_the_name_of_the_evaluation_classifier():
    model = classifier()
    model.card.name = 'small'
    net = eval_feats(model)
    assert net.name == 'small'
    torch.testing.assert_close(model.net.head(net(X)), model.net(X))


def test_features_of_a_data_set_and_of_the_same_images_agree():
    net = eval_feats(classifier())
    u8 = pixels(7)
    want = features(net, u8.float() / 127.5 - 1)
    torch.testing.assert_close(features(net, Images(u8), bs=3), want, rtol=1e-4, atol=1e-5)
    for bad in (u8, u8.numpy()):
        with pytest.raises(TypeError, match='expected float images'):
            features(net, bad)
    with pytest.raises(ValueError, match=r'expected images in \[-1,1\]'):
        features(net, u8.float())


def install(monkeypatch, folder, weights, modules):
    "Empty files of downloaded weights in torch's folder, and modules with the given attributes."
    monkeypatch.setenv('TORCH_HOME', str(folder))
    checkpoints = folder / 'hub/checkpoints'
    checkpoints.mkdir(parents=True)
    (checkpoints / weights).write_bytes(b'')
    for name, attributes in modules.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)


class FakeInception(torch.nn.Module):
    "Replaces torch-fidelity's Inception: the mean colours are the features."

    def __init__(self, name, wanted, feature_extractor_weights_path):
        super().__init__()
        assert wanted == ['2048']
        assert feature_extractor_weights_path.endswith('6726825d.pth')
        self.w = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        return (x.float().mean((2, 3)),)


def test_inception_features_with_package_and_weights(monkeypatch, tmp_path):
    modules = {
        'torch_fidelity': {},
        'torch_fidelity.feature_extractor_inceptionv3': dict(
            FeatureExtractorInceptionV3=FakeInception
        ),
    }
    install(monkeypatch, tmp_path, 'weights-inception-2015-12-05-6726825d.pth', modules)
    net = at_hand(inception_feats, lambda: eval_feats(classifier()))
    assert net.name == 'Inception'
    assert net.key
    mean = pixels(6).float().mean((2, 3))
    torch.testing.assert_close(net(X), mean.expand(6, 3))


class FakeLpipsNetwork(torch.nn.Module):
    "The mean squared difference of two batches of colour images: (B,1,1,1)."

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, y):
        assert x.shape[1] == 3
        return (x - y).square().mean((1, 2, 3), keepdim=True)


class FakeLpips:
    "Replaces torchmetrics' LPIPS."

    def __init__(self, net_type):
        assert net_type == 'alex'
        self.net = FakeLpipsNetwork()


def test_lpips_with_package_and_weights(monkeypatch, tmp_path):
    modules = {
        'torchmetrics': {},
        'torchmetrics.image': {},
        'torchmetrics.image.lpip': dict(LearnedPerceptualImagePatchSimilarity=FakeLpips),
    }
    install(monkeypatch, tmp_path, 'alexnet-owt-7be5be79.pth', modules)
    net = lpips_feats()
    assert net.name == 'alex'
    x = X.repeat(1, 1, 3, 3)
    torch.testing.assert_close(lpips(x, x.flip(0), net), 4 * mse(x, x.flip(0)))
    with pytest.raises(ValueError, match='at least 32x32'):
        lpips(X, X, net)
    with pytest.raises(TypeError, match='alex gives distances'):
        features(net, X)
    with pytest.raises(
        FileNotFoundError, match=r'LPIPS-vgg needs its weights .*vgg16-397923af.pth'
    ):
        lpips_feats('vgg')


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_fidelity', None)
    monkeypatch.setitem(sys.modules, 'torchmetrics', None)
    with pytest.raises(ImportError, match='torch-fidelity'):
        inception_feats()
    with pytest.raises(ImportError, match='torchmetrics'):
        lpips_feats()
    assert at_hand(inception_feats, lpips_feats, lambda: Feats('ours')).name == 'ours'


# ---------------------------------------------------------------- Fréchet distance


@pytest.mark.parametrize('d', [1, 2, 7, 60])
def test_frechet_distance_to_a_linear_map_in_closed_form(d):
    root = rand(d, d, seed=1)
    a = root @ root.T / d
    shift = rand(d, seed=3)
    f = rand(4 * d + 5, d) @ rand(d, d, seed=2)
    g = f @ a + shift
    s = stats(f)
    mean = s.mean @ a + shift
    b = torch.eye(d, dtype=torch.float64) - a
    want = (s.mean - mean).square().sum() + (b @ s.cov @ b).trace()
    np.testing.assert_allclose(frechet(f, g), want, rtol=1e-9)
    np.testing.assert_allclose(frechet(s, (mean, a @ s.cov @ a)), want, rtol=1e-6)
    np.testing.assert_allclose(frechet(f.numpy(), g.numpy()), want, rtol=1e-9)


def test_frechet_distance_by_the_matrix_square_root():
    scipy_linalg = pytest.importorskip('scipy.linalg')
    f = rand(300, 12) @ rand(12, 12, seed=1)
    g = rand(200, 12, seed=2) + 0.3
    mean_f, cov_f, _ = stats(f)
    mean_g, cov_g, _ = stats(g)
    root = scipy_linalg.sqrtm((cov_f @ cov_g).numpy()).real
    traces = cov_f.trace() + cov_g.trace() - 2 * np.trace(root)
    want = (mean_f - mean_g).square().sum() + traces
    np.testing.assert_allclose(frechet(f, g), want, rtol=1e-8)


@pytest.mark.parametrize('n', [2, 3, 30, 64, 65, 200])
@pytest.mark.parametrize('scale', [1e-6, 1.0, 1e6])
def test_frechet_distance_of_few_images(n, scale):
    f = scale * rand(n, 64)
    g = scale * (rand(n, 64, seed=1) + 0.1)
    d = frechet(f, g)
    assert math.isfinite(d)
    assert d > 0
    np.testing.assert_allclose(frechet(stats(f), stats(g)), d, rtol=1e-5)
    np.testing.assert_allclose(frechet(g, f), d, rtol=1e-9)
    total = scale**2 * 64
    assert 0 <= frechet(f, f) < 1e-10 * total
    assert 0 <= frechet(stats(f), stats(f)) < 1e-6 * total
    rotation = torch.linalg.qr(rand(64, 64, seed=2)).Q
    moved = frechet(f @ rotation + 5 * scale, g @ rotation + 5 * scale)
    np.testing.assert_allclose(moved, d, rtol=1e-8)


def test_frechet_distance_of_nearly_singular_covariances():
    q = torch.linalg.qr(rand(50, 50)).Q
    falling = torch.logspace(0, -18, 50, dtype=torch.float64)
    rising = torch.logspace(-18, 0, 50, dtype=torch.float64)
    cov_1 = q @ falling.diag() @ q.T
    cov_2 = q @ rising.diag() @ q.T
    mean = torch.zeros(50)
    want = (falling.sqrt() - rising.sqrt()).square().sum()
    np.testing.assert_allclose(frechet((mean, cov_1), (mean, cov_2)), want, rtol=1e-5)
    assert frechet((mean, cov_1), (mean, cov_1)) < 1e-12
    to_a_point = frechet((mean, 0 * cov_1), (mean + 1, cov_1))
    np.testing.assert_allclose(to_a_point, 50 + cov_1.trace(), rtol=1e-9)


BAD_FEATURES = [
    ('at least 2', rand(1, 4)),
    ('N,D', rand(4)),
    ('NaN', rand(3, 4) * math.nan),
    ('complex', rand(3, 4) + 1j),
    ('N,D', torch.zeros(4, 0)),
]
BAD_STATS = [
    (r'\(4,\) and \(3, 3\)', (torch.zeros(4), torch.eye(3))),
    ('negative eigenvalues', (torch.zeros(4), -torch.eye(4))),
    ('NaN', (torch.zeros(4), math.nan * torch.eye(4))),
]


@pytest.mark.parametrize('message, bad', BAD_FEATURES + BAD_STATS)
def test_frechet_distance_names_bad_features_and_statistics(bad, message):
    good = rand(5, 4)
    with pytest.raises(ValueError, match=message):
        frechet(bad, good)
    with pytest.raises(ValueError, match=message):
        frechet(good, bad)


@pytest.mark.parametrize('message, bad', BAD_FEATURES)
def test_statistics_and_kernel_distance_name_bad_features(bad, message):
    with pytest.raises(ValueError, match=message):
        stats(bad)
    with pytest.raises(ValueError, match=message):
        mmd(bad, rand(50, 4))


@pytest.mark.parametrize('distance', [frechet, mmd])
def test_widths_must_agree(distance):
    with pytest.raises(ValueError, match='one width, got 4 and 5'):
        distance(rand(40, 4), rand(40, 5))


EXACT = (torch.zeros(8), torch.eye(8))  # mean and covariance of the standard normal distribution


def mean_over_samples(distance, n):
    "Mean distance of 30 samples of n numbers to their own distribution."
    return np.mean([distance(EXACT, rand(n, 8, seed=seed)) for seed in range(30)])


@pytest.mark.parametrize('n', [200, 800])
def test_bias_of_the_frechet_distance_falls_as_one_over_n(n):
    bias = mean_over_samples(frechet, n)
    np.testing.assert_allclose(bias * n, 1.25 * 8 + 0.25 * 64, rtol=0.1)


def test_extrapolated_frechet_distance_is_unbiased():
    values = np.array([frechet_inf(EXACT, rand(800, 8, seed=seed)) for seed in range(60)])
    four_standard_errors = 4 * values.std() / 60**0.5
    assert abs(values.mean()) < four_standard_errors < mean_over_samples(frechet, 800) / 2
    with pytest.raises(ValueError, match='16 images'):
        frechet_inf(EXACT, rand(9, 8))


# ---------------------------------------------------------------- kernel distance


# The first three moments of N(0,1) and N(1,1) differ by 1, 1 and 4. The distance is the sum of the
# squares of these differences, with weights of 3, 3 and 1.
@pytest.mark.parametrize('n', [4, 40])
@pytest.mark.parametrize('shift, want', [(0, 0), (1, 3 + 3 + 16)])
def test_kernel_distance_is_unbiased_at_any_n(n, shift, want):
    samples = 4000 // n
    firsts = rand(samples, n, 1)
    seconds = rand(samples, n + 1, 1, seed=1) + shift
    pairs = zip(firsts, seconds, strict=True)
    values = np.array([mmd(f, g, 2)[0] for f, g in pairs])
    four_standard_errors = 4 * values.std() / samples**0.5
    assert abs(values.mean() - want) < four_standard_errors < 10


@pytest.mark.parametrize('shift', [0, 0.7])
def test_standard_error_of_the_kernel_distance_agrees_with_its_spread(shift):
    firsts = rand(60, 60, 5)
    seconds = rand(60, 80, 5, seed=1) + shift
    pairs = zip(firsts, seconds, strict=True)
    values, errors = np.array([mmd(f, g) for f, g in pairs]).T
    assert 0.7 < errors.mean() / values.std() < 3


def kernel(a, b):
    "(x·y/D + 1)³ for D = 3."
    return (a @ b.T / 3 + 1) ** 3


@pytest.mark.parametrize('blocks', [2, 7, 15])
def test_kernel_distance_is_the_u_statistic_for_any_number_of_blocks(blocks):
    f = rand(40, 3)
    g = rand(30, 3, seed=1)
    within_f = (kernel(f, f).sum() - kernel(f, f).trace()) / (40 * 39)
    within_g = (kernel(g, g).sum() - kernel(g, g).trace()) / (30 * 29)
    want = within_f + within_g - 2 * kernel(f, g).mean()
    np.testing.assert_allclose(mmd(f, g, blocks)[0], want, rtol=1e-9)


def test_kernel_distance_of_images_is_that_of_their_features():
    net = eval_feats(classifier())
    real = Images(pixels(40))
    fake = Images(pixels(30, seed=1))
    want = mmd(features(net, real), features(net, fake), blocks=3)
    assert kid(net, real, fake, blocks=3) == want
    with pytest.raises(ValueError, match='10 blocks'):
        kid(net, X, X)
    with pytest.raises(TypeError, match='statistics'):
        mmd(stats(rand(40, 3)), rand(40, 3))


# ---------------------------------------------------------------- statistics of real images


@pytest.fixture
def cache(monkeypatch, tmp_path):
    "An empty cache folder."
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path))
    return tmp_path


def counted(net):
    "The feature network, and a list that collects the sizes of the batches that it embeds."
    sizes = []

    def embed(x):
        sizes.append(len(x))
        return net.embed(x)

    return net._replace(embed=embed), sizes


@pytest.fixture
def counted_net():
    "The evaluation classifier as a feature network, and the sizes of its batches."
    return counted(eval_feats(classifier()))


def assert_equal_stats(first, second):
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.cov, second.cov)
    assert first.n == second.n == 20


def test_reference_statistics_are_computed_once(cache, counted_net):
    net, sizes = counted_net
    images = Images(pixels(20))
    first = reference_stats(net, images)
    again = reference_stats(net, Images(images.x.clone()))
    assert sizes == [20]
    assert_equal_stats(first, again)
    assert fid(net, first, images) < 1e-3
    assert [path.suffix for path in cache.iterdir()] == ['.safetensors']


def test_every_change_of_images_crop_or_network_gives_new_statistics(cache, counted_net):
    net, sizes = counted_net
    images = Images(pixels(20))
    one_pixel = images.x.clone()
    one_pixel[19, 0, 11, 11] ^= 1
    other_net = net._replace(key=eval_feats(classifier(1)).key)
    reference_stats(net, images)
    for changed_net, changed_images, crop in (
        (net, Images(one_pixel), ''),
        (net, images[range(19)], ''),
        (net, images, 'D2C'),
        (other_net, images, ''),
        (net, Images(images.x.reshape(20, 1, 16, 9)), ''),
    ):
        before = len(sizes)
        reference_stats(changed_net, changed_images, crop)
        reference_stats(changed_net, changed_images, crop)
        assert len(sizes) == before + 1
    assert len(list(cache.iterdir())) == 6


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 64
    path.write_bytes(data)


def replace_by_other_tensors(path):
    save_file(dict(a=torch.zeros(2)), path)


def rewrite(path, **changes):
    "Write the file again with other tensors; its note and its checksum are right."
    tensors, note = read_tensors(path)
    write_tensors(path, tensors | changes, note)


def make_covariance_nan(path):
    rewrite(path, cov=math.nan * torch.eye(32).double())


def make_covariance_negative(path):
    rewrite(path, cov=-torch.eye(32).double())


def drop_the_note(path):
    tensors, _ = read_tensors(path)
    write_tensors(path, tensors | dict(mean=tensors['mean'] + 1))


def empty(path):
    path.write_bytes(b'')


def replace_by_text(path):
    path.write_bytes(b'no tensors here' * 99)


DAMAGES = [
    cut,
    flip_a_bit,
    replace_by_other_tensors,
    make_covariance_nan,
    make_covariance_negative,
    drop_the_note,
    empty,
    replace_by_text,
]


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_statistics_are_computed_again(cache, counted_net, damage):
    net, sizes = counted_net
    images = Images(pixels(20))
    first = reference_stats(net, images)
    (path,) = cache.iterdir()
    damage(path)
    again = reference_stats(net, images)
    third = reference_stats(net, images)
    assert len(sizes) == 2
    assert_equal_stats(first, again)
    assert_equal_stats(first, third)


def test_statistics_of_a_network_without_key_are_not_stored(cache):
    net, sizes = counted(Feats('mine', lambda x: x.flatten(1)[:, :5]))
    for _ in range(2):
        assert isinstance(reference_stats(net, Images(pixels(9))), Stats)
    assert len(sizes) == 2
    assert not list(cache.iterdir())
    with pytest.raises(TypeError, match='expected Images, got Tensor'):
        reference_stats(net, X)


# ---------------------------------------------------------------- codes


def squared_distance(a, b):
    return (a - b).square().flatten(1).sum(1)


def identity(z):
    return z


def unit(z):
    "Codes of length 1."
    return z / z.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


PRECISIONS = [(torch.float64, 1e-6), (torch.float32, 0.02)]


@pytest.mark.parametrize('dtype, rtol', PRECISIONS)
def test_ppl_of_an_arc_is_its_squared_angle(dtype, rtol):
    z1 = unit(rand(6, 2, 3, 3, dtype=dtype))
    z2 = unit(rand(6, 2, 3, 3, seed=1, dtype=dtype))
    angle = (z1 * z2).flatten(1).sum(1).acos()
    np.testing.assert_allclose(ppl(identity, z1, z2, squared_distance), angle**2, rtol=rtol)


@pytest.mark.parametrize('dtype, rtol', PRECISIONS)
def test_ppl_of_a_line_is_its_squared_length(dtype, rtol):
    def line(a, b, t):
        return a.lerp(b, t.view(-1, 1, 1, 1))

    def decode(z):
        return 3 * z

    z1 = rand(6, 2, 3, 3, dtype=dtype)
    z2 = rand(6, 2, 3, 3, seed=1, dtype=dtype)
    got = ppl(decode, z1, z2, squared_distance, path=line, t=torch.linspace(0, 1, 6))
    np.testing.assert_allclose(got, 9 * squared_distance(z1, z2), rtol=rtol)


def test_ppl_of_equal_and_of_opposite_codes():
    z = rand(3, 5)
    assert (ppl(identity, z, z, squared_distance) < 1e-12).all()
    assert ppl(identity, z, -z, squared_distance).isfinite().all()


def test_ppl_needs_two_batches_of_float_codes_of_one_shape():
    z = rand(3, 5)
    with pytest.raises(ValueError, match='one shape'):
        ppl(identity, z[:2], z, squared_distance)
    with pytest.raises(ValueError, match='one shape'):
        ppl(identity, z.long(), z.long(), squared_distance)


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('levels', [1, 3, 1e6])
def test_auroc_agrees_with_scikit_learn(seed, levels):
    scores = (rand(200, seed=seed) * levels).round()
    labels = rand(200, seed=seed + 9) > 0.5
    area = auroc(scores, labels)
    assert math.isclose(area, roc_auc_score(labels, scores), abs_tol=1e-12)
    assert math.isclose(auroc(-scores, labels) + area, 1, abs_tol=1e-12)


@pytest.mark.parametrize(
    'scores, labels, message',
    [
        ([1.0, 2.0], [0, 0], '0 with and 2 without'),
        ([1.0, 2.0], [1, 1], '2 with'),
        ([1.0, math.nan], [0, 1], '1 NaN'),
        ([1.0, 2.0], [0, 2], r'labels \[0, 2\]'),
        ([1.0, 2.0], [0], r'\(2,\) and \(1,\)'),
        ([], [], 'both labels'),
    ],
)
def test_auroc_names_bad_scores_and_labels(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        auroc(scores, labels)
