"""Small models of open_clip with random weights, in the folders that open_clip writes."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from tests.testing.networks import randomise
from tests.testing.published import OPEN_CLIP_NAMES, TOKENS, WORDS, join_attention, rename, unigram_tokenizer
from zslflax.models import convnext, fastvit
from zslflax.models.fastvit import Variant
from zslflax.models.import_weights import timm_towers

SIZE, EMBED_DIM = 64, 24
VIT_SIZE = (24, 2, 4, 72)  # width, depth, heads, width inside the perceptrons
EVA_SIZE = (64, 2, 8, 144)  # likewise; the widths of heads are multiples of 4
FASTVIT = Variant((1, 1, 1, 1), (16, 32, 32, 32), 3, 1, activated=True, squeezed=True)
DEPTHS, WIDTHS, EPS = (1, 2, 1, 1), (8, 16, 24, 32), 1e-5
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
TEXT = {"context_length": TOKENS, "width": 32, "heads": 4, "layers": 2}
ENCODER = {  # config.json of a text encoder, without its vocabulary
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 72,
    "max_position_embeddings": 40,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "pad_token_id": 1,
}
VIT = {"image_size": SIZE, "width": 24, "head_width": 6, "patch_size": 16, "layers": 2, "mlp_ratio": 3}
SIGLIP_TEXT = TEXT | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
HF_TEXT = {"context_length": TOKENS, "hf_model_pretrained": False}


def timm(name: str, pool: str, projection: str | None) -> dict[str, Any]:
    """Returns vision_cfg of a tower of timm."""
    return {"image_size": SIZE, "timm_model_name": name, "timm_pool": pool, "timm_proj": projection}


MODELS = {  # model_cfg; text_cfg lacks the places of the tokenizer and of the encoder
    "siglip": {
        "vision_cfg": timm("vit_base_patch16_siglip_224", "map", "none"),
        "text_cfg": SIGLIP_TEXT | {"tokenizer_kwargs": {"clean": "canonicalize"}},
        "custom_text": True,
        "init_logit_bias": -10,
    },
    "siglip2": {
        "vision_cfg": timm("vit_so400m_patch16_siglip_256", "map", "none"),
        "text_cfg": SIGLIP_TEXT
        | {"act_kwargs": {"approximate": "tanh"}, "tokenizer_kwargs": {"clean": "canonicalize"}, "mlp_ratio": 3},
        "custom_text": True,
        "init_logit_bias": -10,
    },
    "siglip without text projection": {
        "vision_cfg": timm("vit_base_patch16_siglip_224", "map", "none"),
        "text_cfg": TEXT | {"width": EMBED_DIM, "no_causal_mask": True, "pool_type": "last", "proj_type": "none"},
        "custom_text": True,
        "init_logit_bias": -10,
    },
    "roberta": {"vision_cfg": VIT, "text_cfg": HF_TEXT | {"hf_pooler_type": "mean_pooler"}, "quick_gelu": True},
    "bert": {
        "vision_cfg": timm("vit_base_patch16_224", "", "linear"),
        "text_cfg": HF_TEXT | {"hf_pooler_type": "cls_last_hidden_state_pooler", "hf_proj_type": "linear"},
    },
    "mean of patches": {
        "vision_cfg": timm("vit_base_patch16_224", "avg", "mlp"),
        "text_cfg": SIGLIP_TEXT | {"tokenizer_kwargs": {"clean": "lower"}},
        "custom_text": True,
    },
    "convnext": {
        "vision_cfg": timm("convnext_base", "", "linear") | {"timm_drop": 0.0, "timm_drop_path": 0.1},
        "text_cfg": TEXT,
    },
    "clipa": {
        "vision_cfg": VIT | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last", "tokenizer_kwargs": {"strip_sep_token": True}},
    },
    "layer scale": {"vision_cfg": VIT | {"ls_init_value": 1e-4, "pool_type": "avg"}, "text_cfg": TEXT},
    "mobileclip2": {
        "vision_cfg": timm("vit_base_patch16_clip_224", "token", None),
        "text_cfg": TEXT | {"no_causal_mask": True},
        "custom_text": True,
    },
    "mobileclip": {
        "vision_cfg": timm("fastvit_mci0", "avg", None),
        "text_cfg": TEXT | {"no_causal_mask": True},
        "custom_text": True,
    },
    "coca": {
        "vision_cfg": VIT
        | {"width": 36, "attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 5}
        | {"output_tokens": True},
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": TEXT,
        "custom_text": True,
    },
    "coca roberta": {
        "vision_cfg": VIT | {"output_tokens": True},
        "text_cfg": HF_TEXT | {"hf_proj_type": "linear", "output_tokens": True},
        "multimodal_cfg": TEXT,
        "custom_text": True,
    },
    "convnext with an mlp": {
        "vision_cfg": timm("convnext_base", "", "mlp") | {"timm_drop_path": 0.1},
        "text_cfg": TEXT | {"pool_type": "eos", "eos_id": 1},
        "custom_text": True,
    },
    "eva02": {
        "vision_cfg": timm("eva02_base_patch16_clip_224", "token", None),
        "text_cfg": TEXT,
        "custom_text": True,
    },
    "pe": {
        "vision_cfg": timm("vit_pe_core_base_patch16_224", "map", None),
        "text_cfg": TEXT,
        "custom_text": True,
    },
}


# Models with open_clip's own tokenizer, which fills up texts with token 0, a word.
OWN_TOKENIZER = ("coca", "mobileclip", "mobileclip2")


TIMM_CONVNEXT_NAMES = {  # of a ConvNeXt in timm: what becomes of the parts of a name of Hugging Face
    r"convnext\.layernorm": "head.norm",
    r"convnext\.": "",
    r"embeddings\.patch_embeddings": "stem.0",
    r"embeddings\.layernorm": "stem.1",
    r"encoder\.stages\.(\d)\.layers\.(\d)": r"stages.\1.blocks.\2",
    r"encoder\.stages\.(\d)\.downsampling_layer": r"stages.\1.downsample",
    r"layernorm\.": "norm.",
    r"dwconv": "conv_dw",
    r"pwconv(\d)": r"mlp.fc\1",
    r"layer_scale_parameter": "gamma",
    r"classifier": "head.fc",
}
TIMM_SIGLIP_NAMES = {  # of SigLIP's image tower in timm, likewise
    r"embeddings\.patch_embedding": "patch_embed.proj",
    r"embeddings\.position_embedding\.weight": "pos_embed",
    r"encoder\.layers": "blocks",
    r"layer_norm(\d)": r"norm\1",
    r"self_attn\.out_proj": "attn.proj",
    r"post_layernorm": "norm",
    r"head\.probe": "attn_pool.latent",
    r"head\.attention\.out_proj": "attn_pool.proj",
    r"head\.layernorm": "attn_pool.norm",
    r"head\.mlp": "attn_pool.mlp",
}


def use_small_towers(monkeypatch: Any, eps: float = EPS) -> None:
    """Makes the names of timm's towers stand for small ones; `eps` is that of the norms of the ConvNeXt."""
    monkeypatch.setitem(timm_towers.VIT_SIZES, "base", VIT_SIZE)
    for name in ("base", "so400m"):
        monkeypatch.setitem(timm_towers.SIGLIP_SIZES, name, VIT_SIZE)
    for family, sizes in timm_towers.EVA_SIZES.items():
        monkeypatch.setitem(timm_towers.EVA_SIZES, family, dict.fromkeys(sizes, EVA_SIZE))
    monkeypatch.setitem(convnext.CONVNEXTS, "convnext_base", (DEPTHS, WIDTHS, eps))
    monkeypatch.setitem(fastvit.FASTVITS, "fastvit_mci0", FASTVIT)


def write_inputs(require: Any, name: str, folder: Path) -> dict[str, Any]:
    """Writes the tokenizer and the config.json of the text encoder of one of `MODELS` into FOLDER/inputs.

    Returns:
        Its model_cfg, in which the places of both are relative to the folder.
    """
    transformers = require("transformers")
    backend, pad = text_tokenizer(name)
    tokens = {"pad_token": pad} | ({"sep_token": "</s>"} if name == "clipa" else {})
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(folder / "inputs")
    text = MODELS[name]["text_cfg"] | ({} if name in OWN_TOKENIZER else {"hf_tokenizer_name": "inputs"})
    if (kind := name.split()[-1]) in ("roberta", "bert"):
        config = ENCODER | {"model_type": kind, "vocab_size": backend.get_vocab_size()}
        (folder / "inputs" / "config.json").write_text(json.dumps(config))
        text["hf_model_name"] = "inputs"
    else:
        text["vocab_size"] = backend.get_vocab_size()
    return {"embed_dim": EMBED_DIM} | MODELS[name] | {"text_cfg": text}


def text_tokenizer(name: str) -> tuple[tokenizers.Tokenizer, str]:
    """Returns the tokenizer of one of `MODELS` and its padding token."""
    if "siglip" in name or name == "mean of patches":
        return unigram_tokenizer(), "</s>"
    words = ["<s>", "<pad>", "<unk>", *WORDS, "_", "'", '"', "it", "s", "</s>"]
    if name == "convnext with an mlp":
        words[1], words[-1] = words[-1], words[1]  # the id of the end is 1, and not the largest
    if name in OWN_TOKENIZER:
        words.insert(0, "!")
    if name == "clipa":
        words[0], words[1] = words[1], words[0]  # the id of padding is 0
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\w+|[^\w\s]|\s"), "isolated")
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[(end, words.index(end)) for end in ("<s>", "</s>")]
    )
    return backend, "<pad>"


def save_from_transformers(require: Any, name: str, folder: Path) -> tuple[Any, Any]:
    """Builds a model of transformers with random weights and saves it in the names and the files of open_clip.

    Args:
        require: the fixture.
        name: one of `MODELS`: "siglip2", "roberta" or "convnext".
        folder: does not exist.

    Returns:
        Two functions: pixels [b, 3, h, w] → the embeddings of images, and token ids [b, t] → those of texts, not of
        unit length.
    """
    torch, files = require("torch"), require("safetensors.torch")
    torch.manual_seed(0)
    folder.mkdir()
    config = write_inputs(require, name, folder)
    for path in (folder / "inputs").glob("tokenizer*"):
        path.rename(folder / path.name)
    build = {"siglip2": build_siglip, "roberta": build_roberta, "convnext": build_convnext}[name]
    modules, to_names, *embed = build(torch, require("transformers"), config["text_cfg"], folder)
    randomise(modules, vectors=0.15)
    weights = to_names(modules.state_dict()) | {"logit_scale": torch.tensor(2.0)}
    if "init_logit_bias" in config:
        weights["logit_bias"] = torch.tensor(-9.0)
    weights = {name: x.contiguous() for name, x in weights.items() if "position_ids" not in name}
    files.save_file(weights, folder / "open_clip_model.safetensors")
    preparation = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    values = {"model_cfg": config, "preprocess_cfg": preparation}
    (folder / "open_clip_config.json").write_text(json.dumps(values))
    return embed[0], embed[1]


def build_siglip(torch: Any, transformers: Any, text: dict[str, Any], folder: Path) -> tuple[Any, ...]:
    """Builds a SigLIP; returns it, what gives its weights their names in open_clip, and its two functions."""
    act = {"hidden_act": "gelu_pytorch_tanh"}
    sizes = {"vocab_size": text["vocab_size"], "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": TOKENS, "projection_size": EMBED_DIM}
    model = transformers.SiglipModel(
        transformers.SiglipConfig(text_config=sizes | act, vision_config=hf_vit(VIT_SIZE) | act)
    )

    def to_names(weights: dict[str, Any]) -> dict[str, Any]:
        of = lambda tower: {n.removeprefix(tower): x for n, x in weights.items() if n.startswith(tower)}
        vision = join_attention(torch, rename(of("vision_model."), TIMM_SIGLIP_NAMES), "attn.qkv.")
        for leaf in ("weight", "bias"):
            q, k, v = vision.pop(f"head.attention.in_proj_{leaf}").chunk(3)
            vision |= {f"attn_pool.q.{leaf}": q, f"attn_pool.kv.{leaf}": torch.cat([k, v])}
        vision["pos_embed"] = vision["pos_embed"][None]
        texts = {n: x for n, x in weights.items() if n.startswith("text_model.")}
        head = {r"text_model\.head": "text_projection"}
        texts = join_attention(torch, rename(texts, OPEN_CLIP_NAMES | head))
        return {f"visual.trunk.{n}": x for n, x in vision.items()} | {f"text.{n}": x for n, x in texts.items()}

    embed_text = lambda ids: model.text_model(ids).pooler_output
    return model, to_names, lambda pixels: model.vision_model(pixels).pooler_output, embed_text


def build_roberta(torch: Any, transformers: Any, text: dict[str, Any], folder: Path) -> tuple[Any, ...]:
    """Builds CLIP's ViT, a RoBERTa and the projections, likewise."""
    config = json.loads((folder / text["hf_model_name"] / "config.json").read_text())
    encoder = transformers.RobertaModel(transformers.RobertaConfig(**config), add_pooling_layer=False)
    vit = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**hf_vit(VIT_SIZE), hidden_act="quick_gelu", projection_dim=EMBED_DIM)
    )
    linear, hidden = torch.nn.Linear, (32 + EMBED_DIM) // 2
    parts = (linear(32, hidden, bias=False), torch.nn.GELU(), linear(hidden, EMBED_DIM, bias=False))
    modules = torch.nn.ModuleDict({"vision": vit, "transformer": encoder, "proj": torch.nn.Sequential(*parts)})

    def to_names(weights: dict[str, Any]) -> dict[str, Any]:
        vision = {n.removeprefix("vision."): x for n, x in weights.items() if n.startswith("vision.")}
        vision = join_attention(torch, rename(vision, OPEN_CLIP_NAMES))
        vision["visual.proj"] = vision["visual.proj"].T
        return vision | {f"text.{n}": x for n, x in weights.items() if not n.startswith("vision.")}

    def embed_text(ids: Any) -> Any:
        mask = ids != config["pad_token_id"]
        vectors = encoder(ids, attention_mask=mask).last_hidden_state * mask[..., None]
        return modules["proj"](vectors.sum(1) / mask.sum(1, keepdim=True))

    return modules, to_names, lambda pixels: vit(pixels).image_embeds, embed_text


def build_convnext(torch: Any, transformers: Any, text: dict[str, Any], folder: Path) -> tuple[Any, ...]:
    """Builds a ConvNeXt, CLIP's text tower and the projections, likewise."""
    config = transformers.ConvNextConfig(hidden_sizes=list(WIDTHS), depths=list(DEPTHS))
    convnext = transformers.ConvNextForImageClassification(config)
    end = text["vocab_size"] - 1
    sizes = {"vocab_size": end + 1, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": TOKENS, "projection_dim": EMBED_DIM}
    tower = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**sizes, hidden_act="gelu", eos_token_id=end, bos_token_id=0, pad_token_id=1)
    )
    proj = torch.nn.Linear(WIDTHS[-1], EMBED_DIM, bias=False)
    modules = torch.nn.ModuleDict({"image": convnext, "text": tower, "proj": proj})

    def to_names(weights: dict[str, Any]) -> dict[str, Any]:
        of = lambda part: {n.removeprefix(part): x for n, x in weights.items() if n.startswith(part)}
        image = {n: x for n, x in rename(of("image."), TIMM_CONVNEXT_NAMES).items() if "head.fc" not in n}
        texts = join_attention(torch, rename(of("text."), OPEN_CLIP_NAMES))
        texts["text_projection"] = texts["text_projection"].T
        return {f"visual.trunk.{n}": x for n, x in image.items()} | texts | {"visual.head.proj.weight": proj.weight}

    embed_image = lambda pixels: proj(convnext.convnext(pixels).pooler_output)
    return modules, to_names, embed_image, lambda ids: tower(ids).text_embeds


def hf_vit(size: tuple[int, ...]) -> dict[str, Any]:
    """Returns the fields of a ViT in transformers from its width, depth, heads and width inside the perceptrons."""
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return dict(zip(fields, size)) | {"image_size": SIZE, "patch_size": 16}
