"""Tiny checkpoints of the three classes, written as their repositories on the hub are.

The weights are random and come from transformers' classes. All files are written by hand, in the
published layout: save_pretrained of today writes another one.
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
BYTES = 256  # the tokenizer's tokens before the special ones: bytes, and the two merges below
MERGES = ["Ġ t", "h e"]
FIRST_SPECIAL = BYTES + len(MERGES)
ID = {token: FIRST_SPECIAL + number for number, token in enumerate(SPECIAL_TOKENS)}
VOCAB = 272  # the head has rows that no token uses, as on the hub

# Short templates in the structure of the published ones.
TEXT_TEMPLATE = (
    "{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}"
    "{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
VISION_TEMPLATE = (
    "{% set images = namespace(count=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "{% set images.count = images.count + 1 %}"
    "{% if add_vision_id %}Picture {{ images.count }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
VISION_IDS = {
    "vision_start_token_id": ID["<|vision_start|>"],
    "vision_end_token_id": ID["<|vision_end|>"],
    "vision_token_id": ID["<|vision_pad|>"],
    "image_token_id": ID["<|image_pad|>"],
    "video_token_id": ID["<|video_pad|>"],
}
ENDS = {"bos_token_id": ID["<|endoftext|>"], "eos_token_id": ID["<|im_end|>"]}
LANGUAGE_MODEL = {
    "attention_dropout": 0.0,
    **ENDS,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.2,  # on the hub 0.02; so the weights are large enough to matter
    "intermediate_size": 64,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "use_cache": True,
    "vocab_size": VOCAB,
}


def flat_config(name: str, version: str, tied: bool, vision: dict) -> dict:
    """config.json of Qwen2-VL and Qwen2.5-VL: the language model's settings stand at the top."""
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        **VISION_IDS,
        **LANGUAGE_MODEL,
        "max_window_layers": 2,
        "model_type": {"Qwen2VL": "qwen2_vl", "Qwen2_5_VL": "qwen2_5_vl"}[name],
        "rope_theta": 1000000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": version,
        "use_sliding_window": False,
        "vision_config": vision,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]},
    }


def nested_config() -> dict:
    """config.json of Qwen3-VL."""
    tokens = {key: value for key, value in VISION_IDS.items() if key != "vision_token_id"}
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        **tokens,
        "model_type": "qwen3_vl",
        "text_config": {
            **LANGUAGE_MODEL,
            "attention_bias": False,
            "dtype": "bfloat16",
            "head_dim": 12,
            "model_type": "qwen3_vl_text",
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": [2, 2, 2],
                "rope_type": "default",
            },
            "rope_theta": 5000000,
            "tie_word_embeddings": True,
        },
        "tie_word_embeddings": True,
        "transformers_version": "4.57.0.dev0",
        "vision_config": {
            "deepstack_visual_indexes": [0],
            "depth": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 32,
            "in_channels": 3,
            "initializer_range": 0.2,
            "intermediate_size": 64,
            "model_type": "qwen3_vl",
            "num_heads": 2,
            "num_position_embeddings": 64,
            "out_hidden_size": 48,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def pixels_file(processor: str) -> dict:
    """preprocessor_config.json of Qwen2-VL and Qwen2.5-VL: there is no `size`."""
    return {
        "min_pixels": 4 * 28 * 28,
        "max_pixels": 9 * 28 * 28,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": processor,
    }


SIZE_FILE = {  # preprocessor_config.json of Qwen3-VL
    "size": {"longest_edge": 9 * 32 * 32, "shortest_edge": 4 * 32 * 32},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}

QWEN2_VISION = {
    "depth": 2,
    "embed_dim": 32,
    "mlp_ratio": 2,
    "num_heads": 2,
    "in_chans": 3,
    "hidden_size": 48,
    "initializer_range": 0.2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
}
QWEN2_5_VISION = {
    "depth": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.2,
    "intermediate_size": 64,
    "num_heads": 2,
    "in_chans": 3,
    "out_hidden_size": 48,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "window_size": 56,
    "fullatt_block_indexes": [1],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
}

# class -> files that differ: config.json, preprocessor_config.json, sampling, template file, shards
KINDS = {
    "Qwen2VL": {
        "config": flat_config("Qwen2VL", "4.41.2", True, QWEN2_VISION),
        "images": pixels_file("Qwen2VLProcessor"),
        "sampling": {"temperature": 0.01, "top_p": 0.001, "top_k": 1},
        "template": "chat_template.json",
        "shards": 2,
    },
    "Qwen2_5_VL": {  # as the 7B model: it has a head of its own
        "config": flat_config("Qwen2_5_VL", "4.41.2", False, QWEN2_5_VISION),
        "images": pixels_file("Qwen2_5_VLProcessor"),
        "sampling": {"repetition_penalty": 1.05, "temperature": 0.1, "top_p": 0.001, "top_k": 1},
        "template": "chat_template.json",
        "shards": 3,
    },
    "Qwen3VL": {
        "config": nested_config(),
        "images": SIZE_FILE,
        "sampling": {"top_k": 20, "top_p": 0.8, "repetition_penalty": 1.0, "temperature": 0.7},
        "template": "chat_template.jinja",
        "shards": 1,
    },
}


def write_checkpoint(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """A repository of the class `kind` in `folder`. Returns the weights by their hub names."""
    files = KINDS[kind]
    write_json(folder / "config.json", files["config"])
    write_json(folder / "preprocessor_config.json", files["images"])
    ends = [ID["<|im_end|>"], ID["<|endoftext|>"]]
    generation = {
        "bos_token_id": ID["<|endoftext|>"],
        "pad_token_id": ID["<|endoftext|>"],
        "do_sample": True,
        "eos_token_id": ends,
        **files["sampling"],
        "transformers_version": "4.37.0",
    }
    write_json(folder / "generation_config.json", generation)
    if files["template"] == "chat_template.json":
        write_json(folder / files["template"], {"chat_template": VISION_TEMPLATE})
    else:
        (folder / files["template"]).write_text(VISION_TEMPLATE, encoding="utf-8")
    write_tokenizer(folder)
    weights = random_weights(kind, folder)
    write_weights(folder, weights, files["shards"])
    return weights


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def random_weights(kind: str, folder: Path) -> dict[str, torch.Tensor]:
    """bfloat16, by the names that the hub's files have. A tied head is not among them."""
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    for parameter in model.parameters():  # also norms and biases, which start at 1 and 0
        parameter.data += 0.05 * torch.randn(parameter.shape)
    weights = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and KINDS[kind]["config"]["tie_word_embeddings"]:
            continue
        if kind != "Qwen3VL":
            name = name.replace("model.language_model.", "model.", 1)
            name = name.replace("model.visual.", "visual.", 1)
        weights[name] = value.bfloat16().clone()
    return weights


def write_weights(folder: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    """model.safetensors, or shards of it and their index."""
    if shards == 1:
        return save_file(weights, folder / "model.safetensors", {"format": "pt"})
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        names = [name for place, name in enumerate(weights) if place % shards == number]
        save_file({name: weights[name] for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total_size = sum(value.nbytes for value in weights.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


# ---------------------------------------------------------------------------------- the tokenizer
def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of the class Qwen2Tokenizer, with the text template as its own."""
    tokens = [*byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]
    vocab = {token: number for number, token in enumerate(tokens)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = {
        str(number): {"content": token, **flags, "special": True} for token, number in ID.items()
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": int(number), **token} for number, token in added.items()],
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {**byte_level, "use_regex": True},
            "post_processor": {**byte_level, "use_regex": False},
            "decoder": {**byte_level, "use_regex": False},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": vocab,
                "merges": MERGES,
            },
        },
    )
    write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("\n".join(MERGES) + "\n", encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "bos_token": None,
            "chat_template": TEXT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 32768,
            "pad_token": "<|endoftext|>",
            "padding_side": "left",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
