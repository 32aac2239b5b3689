"""FastViT compared with timm's PyTorch model, and its branches with the one convolution that they are equal to."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.testing.networks import load_and_apply, perturb, random_images, randomise
from zslflax.models.batch_norm import batch_norm
from zslflax.models.build import image_tower
from zslflax.models.fastvit import FASTVITS, Branches, FastViT, Variant
from zslflax.models.import_weights.layouts import TIMM_FASTVIT, published_names
from zslflax.models.import_weights.load import load_image_tower

WIDTHS = (16, 32, 32, 64)
SMALL = {
    "mixers": Variant((1, 2, 1, 1), WIDTHS, 3, 0),
    "attention": Variant((1, 1, 1, 2), WIDTHS, 2, 1),
    "mobileclip": Variant((1, 1, 1, 1), WIDTHS, 3, 1, activated=True, squeezed=True),
    "mobileclip2": Variant((1, 1, 1, 1, 1), (*WIDTHS, 64), 2, 2, activated=True, layer_norm=True),
}
# The first outputs of timm 1.0.31's class FastVit for the weights of `weight` and the image of `WAVES`.
TIMM_OUTPUTS = {
    "mixers": (0.047578, -0.126767, 0.000735, -0.018911, 0.205959),
    "attention": (-0.116235, -0.163199, -0.012782, -0.013760, 0.546457),
    "mobileclip": (-0.122079, -0.168604, -0.154855, -0.046377, -0.016298),
    "mobileclip2": (-0.108060, -0.168455, -0.121136, -0.160895, -0.119394),
}
WAVES = np.sin(np.arange(64 * 96 * 3) * 0.1).reshape(1, 64, 96, 3).astype(np.float32)
PARAMETERS = {  # of timm's models without a classifier
    "fastvit_t8": 3_257_232,
    "fastvit_t12": 6_528_704,
    "fastvit_s12": 8_448_576,
    "fastvit_sa12": 10_555_968,
    "fastvit_sa24": 20_529_216,
    "fastvit_sa36": 30_502_464,
    "fastvit_ma36": 42_851_004,
    "fastvit_mci0": 10_882_176,
    "fastvit_mci1": 21_016_832,
    "fastvit_mci2": 35_159_360,
    "fastvit_mci3": 122_875_584,
    "fastvit_mci4": 318_638_336,
}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of a name of timm and of a shape, by a rule that its model was given too."""
    x = np.sin(np.arange(1, np.prod(shape) + 1) * 0.7 + len(name)).astype(np.float32).reshape(shape)
    if name.endswith("running_var"):
        return 1.0 + 0.5 * x
    if name.endswith("gamma"):
        return 0.5 * x
    if len(shape) > 1:
        return x / np.sqrt(np.prod(shape[1:]))
    return (1.0 if name.endswith("weight") else 0.0) + 0.3 * x


def torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in PyTorch of the variable at a path."""
    if path[-1] == "kernel":
        return tuple(shape[i] for i in ((3, 2, 0, 1) if len(shape) == 4 else (1, 0)))
    return (*shape, 1, 1) if path[-2].startswith("layer_scale") else shape


@pytest.mark.parametrize("name", SMALL)
def test_outputs_are_those_of_timm(require, tmp_path, monkeypatch, name):
    monkeypatch.setitem(FASTVITS, "fastvit_t8", SMALL[name])
    model = FastViT(SMALL[name])
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    weights = {}
    for (_, *path), x in flatten_dict(shapes).items():
        (timm_name,) = published_names(TIMM_FASTVIT, tuple(path))
        weights[timm_name] = weight(timm_name, torch_shape(tuple(path), x.shape))
    require("safetensors.numpy").save_file(weights, tmp_path / "model.safetensors")
    found = load_and_apply(tmp_path, "fastvit_t8", WAVES)
    np.testing.assert_allclose(found[0, :5], TIMM_OUTPUTS[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", SMALL)
def test_agrees_with_timm(require, tmp_path, monkeypatch, name):
    torch, files = require("torch"), require("safetensors.torch")
    timm = pytest.importorskip("timm.models.fastvit", exc_type=ImportError)
    variant = SMALL[name]
    stages = len(variant.depths)
    position = partial(timm.RepConditionalPosEnc, spatial_shape=(7, 7))
    norm = {"norm_layer": partial(timm.LayerNorm2d, eps=1e-5), "stem_use_scale_branch": False}
    torch.manual_seed(0)
    original = timm.FastVit(
        layers=variant.depths,
        embed_dims=variant.widths,
        mlp_ratios=(variant.expansion,) * stages,
        token_mixers=("repmixer",) * (stages - variant.attention) + ("attention",) * variant.attention,
        pos_embs=(None,) * (stages - variant.attention) + (position,) * variant.attention,
        downsamples=(False, *(True,) * (stages - 1)),
        se_downsamples=(False,) * (stages - 2) + (variant.squeezed,) * 2,
        lkc_use_act=variant.activated,
        num_classes=5,
        **(norm if variant.layer_norm else {}),
    ).eval()
    randomise(original, vectors=0.2)
    with torch.no_grad():
        for key, value in original.state_dict().items():
            if "running" in key:
                value.add_(torch.rand_like(value))
    files.save_file(original.state_dict(), tmp_path / "model.safetensors")
    images = random_images(2, 64, 96)
    with torch.no_grad():
        wanted = original.forward_head(
            original.forward_features(torch.tensor(images.transpose(0, 3, 1, 2))), pre_logits=True
        )
    monkeypatch.setitem(FASTVITS, "fastvit_t8", variant)
    found = load_and_apply(tmp_path, "fastvit_t8", images)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize(("kernel", "small", "stride", "channels"), [(3, 1, 1, 8), (3, 1, 2, 16), (7, 3, 2, 16)])
def test_branches_are_one_convolution(require, depthwise, kernel, small, stride, channels):
    torch = require("torch")
    norm = batch_norm(jnp.float32, None, train=False)
    branches = Branches(channels, kernel, norm, jnp.float32, stride, small, depthwise)
    x = np.random.default_rng(0).normal(size=(2, 16, 12, 8)).astype(np.float32)
    variables = perturb(branches.init(jax.random.key(0), x))
    params, stats = variables["params"], variables["batch_stats"]

    def fold(kernel_hwio, name):
        factor = params[name]["scale"] / np.sqrt(stats[name]["var"] + 1e-5)
        return kernel_hwio * factor, params[name]["bias"] - stats[name]["mean"] * factor

    parts = [fold(params["conv"]["kernel"], "conv_bn")]
    pad = (kernel - small) // 2
    parts.append(fold(np.pad(params["small_conv"]["kernel"], ((pad, pad), (pad, pad), (0, 0), (0, 0))), "small_bn"))
    if "skip_bn" in params:
        identity = np.zeros((kernel, kernel, 1 if depthwise else 8, 8))
        identity[kernel // 2, kernel // 2] = 1.0 if depthwise else np.eye(8)
        parts.append(fold(identity, "skip_bn"))
    assert len(parts) == (3 if channels == 8 and stride == 1 else 2)
    weights, bias = (torch.tensor(np.asarray(sum(part), np.float32)) for part in zip(*parts))
    wanted = torch.nn.functional.conv2d(
        torch.tensor(x.transpose(0, 3, 1, 2)),
        weights.permute(3, 2, 0, 1),
        bias,
        stride=stride,
        padding=(kernel - 1) // 2,
        groups=8 if depthwise else 1,
    )
    found = branches.apply(variables, x)
    np.testing.assert_allclose(found, wanted.permute(0, 2, 3, 1).numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_number_of_parameters_is_the_published_one(name):
    tower = image_tower(name, jnp.float32, None, remat=False)
    params = jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == PARAMETERS[name]


def test_every_variant_is_counted():
    assert sorted(PARAMETERS) == sorted(FASTVITS)


def test_other_fastvits_are_refused_by_field(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "fastvit_mci1"}')
    with pytest.raises(ValueError, match="architecture 'fastvit_mci1', but fastvit_t8 here computes with"):
        load_image_tower(tmp_path, "fastvit_t8", {}, 224)
