"""Miniatures of everything that the recipes read, in the layouts of their authors."""

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import tokenizers
from flax import nnx
from PIL import Image
from transformers import PreTrainedTokenizerFast

from geode_jax.models.decoder import Decoder, DecoderConfig
from geode_jax.models.vit import InternViT, VitConfig
from geode_jax.weights import save_pretrained
from tests.helpers.videos import write_video
from tests.rehearsal.questions import write_questions
from tests.rehearsal.scans import NAMES, write_real_scans
from tests.sources.datasets.arkitscenes_test import write_arkitscenes
from tests.sources.datasets.front3d_test import write_front
from tests.sources.datasets.scannet_test import write_scan
from tests.sources.datasets.scannetpp_test import write_scene as write_scannetpp_scene
from tests.sources.datasets.vsi_bench_test import write_vsi_bench

FAKES = Path(__file__).resolve().parent.parent / "third_party" / "fakes"
PICTURES = [f"picture{n}" for n in range(6)]
SCANS = [f"scene{n:04d}_00" for n in range(8)]
HOUSES = 4
BENCHMARK = {SCANS[0]: "scannet", f"{0:010x}": "scannetpp", "47333440": "arkitscenes"}
"""Scenes of VSI-Bench, two of which are among those on disk and must not be trained on."""
TRUE_VGGT = """before=
for word; do
    case "$before $word" in
    *vsi-bench) ;;
    "--export "*) export FAKE_VGGT_TRUTH="{\\"export\\": \\"$word\\"}" ;;
    esac
    before=$word
done
"""
"""Makes the stand-in for VGGT see the geometry of the export that it is asked about, if that has
any; the videos of VSI-Bench have none."""
QWEN_ROWS, LLAMA_ROWS = 151_936, 600
QWEN = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_width": 8, "mlp_width": 32}
INTERNVIT = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 32}
WORDS = (*NAMES, "bed", "stove", "yes", "no", "left", "right", "above", "below", "meters", "which")


def write_raw(root: Path, data: Path | None) -> None:
    """Writes the folder `RAW` of the recipes.

    Args:
        root: a new folder.
        data: folder of real data, `GEODE_JAX_DATA`; without it all scans are of cuboids.
    """
    recording = data and data / "open3d_livingroom1"
    real = 4 if recording and recording.is_dir() else 0
    if real:
        write_real_scans(root / "scannet" / "scans", recording, SCANS[:real])
    for n, name in enumerate(SCANS[real:]):
        write_scan(root / "scannet" / "scans", name, seed=n)
    write_front(root / "3d-front", houses=HOUSES)
    write_arkitscenes(root / "arkitscenes")
    for n in range(3):
        write_scannetpp_scene(root / "scannetpp" / "data" / f"{n:010x}", seed=n)
    write_questions(root, SCANS, PICTURES)
    for name in PICTURES:
        picture = root / "cambrian-alignment" / "images" / "llava_pretrain" / f"{name}.jpg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (90, 120, 60)).save(picture)
        write_video(root / "s-mit" / "images" / "sitting" / f"{name}.mp4", 9)
    write_vsi_bench(root / "vsi-bench", scenes=BENCHMARK)
    _write_llama_tokenizer(root / "tokenizer")
    for project in ("LLaVA-3D", "sonata"):
        _write_interpreter(root / project / ".venv" / "bin" / "python")
    _write_interpreter(root / "vggt" / ".venv" / "bin" / "python", TRUE_VGGT)
    _write_sonata(root / "sonata" / "sonata.pth")
    _write_pretrained(root, data)
    (root / "LLaVA-3D" / "videos").mkdir()
    shutil.copytree(root / "tokenizer", root / "LLaVA-3D" / "llava-3d-tiny")


def _write_interpreter(path: Path, before: str = "") -> None:
    """Writes an interpreter in which the stand-ins of the exporters' projects are installed."""
    path.parent.mkdir(parents=True)
    path.write_text(f'#!/bin/sh\n{before}PYTHONPATH="{FAKES}" exec "{sys.executable}" "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def _write_sonata(path: Path) -> None:
    """Writes the checkpoint of the stand-in for Sonata."""
    source = (
        "import sys, torch; from sonata.model import PointTransformerV3 as Model\n"
        "config = dict(in_channels=9, shuffle_orders=True, enable_flash=False)\n"
        "torch.save(dict(config=config, state_dict=Model(**config).state_dict()), sys.argv[1])"
    )
    python = path.parent / ".venv" / "bin" / "python"
    subprocess.run([python, "-c", source, path], check=True)


def _write_pretrained(root: Path, data: Path | None) -> None:
    """Writes folders of Qwen2.5 with its real tokenizer where that is at hand, and of InternViT."""
    language, vision = root / "Qwen2.5-1.5B-Instruct", root / "InternViT-300M-448px-V2_5"
    real = data and data / "qwen25_tokenizer"
    decoder = DecoderConfig(
        vocab_size=QWEN_ROWS if real else LLAMA_ROWS, **QWEN, mlp="swiglu", norm="rms",
        linear_bias=False, tied_head=True, rope_theta=1e6, norm_eps=1e-6,
    )  # fmt: skip
    save_pretrained(Decoder(decoder, rngs=nnx.Rngs(0)), language)
    save_pretrained(InternViT(VitConfig(448, 14, **INTERNVIT), rngs=nnx.Rngs(1)), vision)
    source = real or root / "tokenizer"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, language / name)


def _write_llama_tokenizer(folder: Path) -> None:
    """Writes a tokenizer of Llama's type: byte pairs, spaces as letters, bytes for the rest."""
    model = tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, show_progress=False
    )
    texts = [f"the {word} is 1 2 3 4 5 6 7 8 9 0 . ?" for word in WORDS]
    backend.train_from_iterator(texts, trainer)
    strip = tokenizers.decoders.Strip(" ", 1, 0)
    backend.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(),
         tokenizers.decoders.Fuse(), strip]
    )  # fmt: skip
    # The trainer calls the bytes special, too, which decoding would then leave out.
    content = json.loads(backend.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    folder.mkdir(parents=True)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
