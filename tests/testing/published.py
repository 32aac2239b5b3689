"""Small CLIPs and SigLIPs with random weights, as Hugging Face and open_clip publish them."""

import json
import re
from pathlib import Path

import numpy as np
import tokenizers

from tests.testing.networks import randomise

TEXT = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"hidden_size": 24, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE, PATCH, TOKENS, EMBED_DIM = 32, 8, 16, 20
WORDS = "a an photo of the cat dog red blue . two dogs play".split()
TEXTS = [
    "a photo of a cat.",
    "Two dogs play",
    "red",
    "a red dog an the blue cat of a dog of a cat of a dog of a red cat",
]


def save_clip(require, folder: Path, text_width: int = 32):
    """Saves a CLIP with random weights, its tokenizer and its image processor; returns the original model."""
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    backend = clip_tokenizer()
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": backend.get_vocab_size()}
    config = transformers.CLIPConfig(
        text_config=TEXT | ids | {"max_position_embeddings": TOKENS, "hidden_size": text_width},
        vision_config=IMAGE | {"image_size": SIZE, "patch_size": PATCH},
        projection_dim=EMBED_DIM,
    )
    return save(
        transformers.CLIPModel(config),
        folder,
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=TOKENS
        ),
        transformers.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE),
    )


def save_siglip(require, folder: Path, size: int = SIZE):
    """Saves a SigLIP for images of a size likewise."""
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(1)
    backend = unigram_tokenizer()
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": backend.get_vocab_size()}
    config = transformers.SiglipConfig(
        text_config=TEXT | ids | {"max_position_embeddings": TOKENS, "projection_size": 24},
        vision_config=IMAGE | {"image_size": size, "patch_size": PATCH},
    )
    return save(
        transformers.SiglipModel(config),
        folder,
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="</s>", eos_token="</s>", model_max_length=TOKENS
        ),
        transformers.SiglipImageProcessor(size={"height": size, "width": size}),
    )


def save(model, folder: Path, tokenizer, processor):
    """Randomises all weights of a model and saves it with its tokenizer and image processor."""
    randomise(model, vectors=0.15)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return model


def clip_tokenizer() -> tokenizers.Tokenizer:
    """A tokenizer of words in the form of CLIP's: its texts start and end with special tokens."""
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *WORDS]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<|endoftext|>")
    )
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        "<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    )
    return backend


def unigram_tokenizer() -> tokenizers.Tokenizer:
    """A tokenizer in the form of SigLIP's: its texts end with a special token."""
    pieces = ["<unk>", "</s>", "▁", *(f"▁{word}" for word in WORDS), *"abcdefghijklmnopqrstuvwxyz."]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram([(piece, -float(len(piece))) for piece in pieces], 0))
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return backend


OPEN_CLIP_NAMES = {  # of a CLIP in open_clip: what becomes of the parts of a name of Hugging Face
    r"text_model\.embeddings\.token_embedding": "token_embedding",
    r"text_model\.embeddings\.position_embedding\.weight": "positional_embedding",
    r"text_model\.encoder\.layers": "transformer.resblocks",
    r"text_model\.final_layer_norm": "ln_final",
    r"text_projection\.weight": "text_projection",
    r"vision_model\.embeddings\.class_embedding": "visual.class_embedding",
    r"vision_model\.embeddings\.patch_embedding": "visual.conv1",
    r"vision_model\.embeddings\.position_embedding\.weight": "visual.positional_embedding",
    r"vision_model\.pre_layrnorm": "visual.ln_pre",
    r"vision_model\.post_layernorm": "visual.ln_post",
    r"vision_model\.encoder\.layers": "visual.transformer.resblocks",
    r"visual_projection\.weight": "visual.proj",
    r"layer_norm(\d)": r"ln_\1",
    r"mlp\.fc1": "mlp.c_fc",
    r"mlp\.fc2": "mlp.c_proj",
    r"self_attn\.out_proj": "attn.out_proj",
}


def rename(weights, names):
    """Returns weights under other names: regular expressions in `names` are replaced where a part of a name starts."""
    renamed = {}
    for name, value in weights.items():
        for old, new in names.items():
            name = re.sub(rf"(?:^|(?<=\.)){old}", new, name)
        renamed[name] = value
    return renamed


def join_attention(torch, weights, joined="attn.in_proj_"):
    """Replaces the three projections of each attention by one, whose name ends with `joined` and weight or bias."""
    for name in [name for name in weights if ".self_attn.q_proj." in name]:
        parts = [weights.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        weights[name.replace("self_attn.q_proj.", joined)] = torch.cat(parts)
    return weights


def to_open_clip(require, source: Path, folder: Path) -> None:
    """Writes the CLIP of a folder in the names, the files and the layout of tensors that open_clip has."""
    torch, weights = require("torch"), require("safetensors.torch").load_file(source / "model.safetensors")
    renamed = join_attention(torch, rename(weights, OPEN_CLIP_NAMES))
    for name in ("visual.proj", "text_projection"):
        renamed[name] = renamed[name].T.contiguous()
    folder.mkdir()
    require("safetensors.torch").save_file(renamed, folder / "open_clip_model.safetensors")
    for path in source.glob("tokenizer*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    sizes = {"layers": 2, "mlp_ratio": 3}
    vocabulary = renamed["token_embedding.weight"].shape[0]
    model = {
        "embed_dim": EMBED_DIM,
        "quick_gelu": True,
        "vision_cfg": {"image_size": SIZE, "width": 24, "head_width": 6, "patch_size": PATCH, **sizes},
        "text_cfg": {"context_length": TOKENS, "vocab_size": vocabulary, "width": 24, "heads": 4, **sizes},
    }
    preparation = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"}
    values = {"model_cfg": model, "preprocess_cfg": preparation | {"resize_mode": "shortest"}}
    (folder / "open_clip_config.json").write_text(json.dumps(values))


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth random image, uint8 [height, width, 3]."""
    waves = np.random.default_rng(seed).uniform(0.02, 0.3, (2, 3))
    y, x = np.mgrid[:height, :width]
    return (127 * (1 + np.sin(y[..., None] * waves[0] + x[..., None] * waves[1]))).astype(np.uint8)
