"""A small CLIP with a ResNet and random weights, as open_clip publishes them; its image tower is of PyTorch's parts."""

import json
from pathlib import Path

from tests.testing.networks import randomise_batch_norm
from tests.testing.published import EMBED_DIM, save_clip, to_open_clip

LAYERS, WIDTH, HEAD_WIDTH, SIZE = (1, 2, 1, 1), 16, 64, 64
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def image_tower(torch, size: int = SIZE):
    """A ResNet of CLIP with random weights and batch statistics for images of a size; its modules have OpenAI's names.

    Its `forward(x, projected)` returns what precedes the projection where `projected` is False.
    """
    nn, functional, channels = torch.nn, torch.nn.functional, 32 * WIDTH
    conv = lambda i, o, k, s=1: nn.Conv2d(i, o, k, s, k // 2, bias=False)

    class Bottleneck(nn.Module):
        def __init__(self, i, width, stride):
            super().__init__()
            self.conv1, self.bn1 = conv(i, width, 1), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
            self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
            self.pool = nn.AvgPool2d(stride)
            self.downsample = nn.Sequential()
            if i != 4 * width:
                self.downsample = nn.Sequential(conv(i, 4 * width, 1), nn.BatchNorm2d(4 * width))

        def forward(self, x):
            y = self.bn1(self.conv1(x)).relu()
            y = self.pool(self.bn2(self.conv2(y)).relu())
            return (self.bn3(self.conv3(y)) + self.downsample(self.pool(x))).relu()

    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.positional_embedding = nn.Parameter(0.1 * torch.randn(1 + (size // 32) ** 2, channels))
            for part in "qkv":
                setattr(self, f"{part}_proj", nn.Linear(channels, channels))
            self.c_proj = nn.Linear(channels, EMBED_DIM)

        def forward(self, x, projected):
            x = x.flatten(2).mT  # (b, h * w, c)
            x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding
            heads = lambda y: y.unflatten(2, (-1, HEAD_WIDTH)).transpose(1, 2)  # (b, heads, t, c / heads)
            q, k, v = heads(self.q_proj(x[:, :1])), heads(self.k_proj(x)), heads(self.v_proj(x))
            y = functional.scaled_dot_product_attention(q, k, v).flatten(1)
            return self.c_proj(y) if projected else y

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = conv(3, WIDTH // 2, 3, 2), nn.BatchNorm2d(WIDTH // 2)
            self.conv2, self.bn2 = conv(WIDTH // 2, WIDTH // 2, 3), nn.BatchNorm2d(WIDTH // 2)
            self.conv3, self.bn3 = conv(WIDTH // 2, WIDTH, 3), nn.BatchNorm2d(WIDTH)
            i = WIDTH
            for stage, blocks in enumerate(LAYERS):
                layer = []
                for j in range(blocks):
                    layer.append(Bottleneck(i, WIDTH * 2**stage, 2 if stage and not j else 1))
                    i = 4 * WIDTH * 2**stage
                setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
            self.attnpool = Pool()

        def forward(self, x, projected=True):
            for number in (1, 2, 3):
                x = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(x)).relu()
            x = functional.avg_pool2d(x, 2)
            for number in range(len(LAYERS)):
                x = getattr(self, f"layer{number + 1}")(x)
            return self.attnpool(x, projected)

    torch.manual_seed(0)
    network = Network().eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, channels**-0.5)
        if isinstance(module, nn.BatchNorm2d):
            randomise_batch_norm(module)
    return network


def save_clip_resnet(require, folder: Path):
    """Saves the model in the names and the half precision in which OpenAI published it, with open_clip's files.

    Returns:
        The image tower in PyTorch, with the weights that were saved, and the original model of the text tower.
    """
    torch, safetensors = require("torch"), require("safetensors.torch")
    text_model = save_clip(require, folder.with_name(f"{folder.name}_vit"), text_width=24)
    to_open_clip(require, folder.with_name(f"{folder.name}_vit"), folder)
    path = folder / "open_clip_model.safetensors"
    tensors = {name: x for name, x in safetensors.load_file(path).items() if not name.startswith("visual.")}
    network = image_tower(torch).half().float()
    tensors |= {f"visual.{name}": x.half() if x.is_floating_point() else x for name, x in network.state_dict().items()}
    tensors |= {name: torch.tensor(8) for name in ("input_resolution", "context_length", "vocab_size")}
    safetensors.save_file(tensors, path)
    config = json.loads((folder / "open_clip_config.json").read_text())
    tower = {"layers": list(LAYERS), "width": WIDTH, "head_width": HEAD_WIDTH, "image_size": SIZE, "patch_size": None}
    config["model_cfg"]["vision_cfg"] = tower
    config["preprocess_cfg"] |= {"mean": MEAN, "std": STD}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return network, text_model
