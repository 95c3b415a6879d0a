"""Adds LLaVA-3D's answers, their top-k logits and its patch features to an export, as a teacher.

Runs in the environment and the checkout of https://github.com/ZCMax/LLaVA-3D (README.md beside
this file):

    python export_llava3d.py --export prepared --videos playground/data/LLaVA-3D-Pretrain/scannet \\
        --out taught --tokenizer student_tokenizer --efficiency teacher.json

The model gives no depth and no boxes: posed depth is its input, and its grounding decoder is not
released. Depth and boxes come from the data set.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import export_job as job
import export_views as views

LICENCE = "CC BY-NC-SA 4.0 (LLaVA-3D)"
SEED = 0
"""Seed of the draw that keeps 2,560 of a scene's voxels; set again before every question."""


def same_tokenizer(contract: Any, tokenizer: Any, folder: Path) -> tuple[str, int]:
    """Returns the sha256 and the size of a student's tokenizer.json with the teacher's ids.

    Raises:
        InputError: the file cannot be read, or gives a token another id.
    """
    path = folder / "tokenizer.json"
    if path.exists() and not path.is_file():  # reading a pipe could block forever
        raise job.InputError(f"{path}: not a regular file")
    try:
        data = contract.files.read_bytes(path)
        described = contract.files.parse_json(path, data)
        theirs = dict(described["model"]["vocab"])
        theirs.update((token["content"], token["id"]) for token in described["added_tokens"])
    except (ValueError, KeyError, TypeError) as error:
        raise job.InputError(f"{path}: no tokenizer with a vocabulary: {error!r}") from None
    for token, index in tokenizer.get_vocab().items():
        if theirs.get(token) != index:
            raise job.InputError(
                f"{path}: token {token!r} is {theirs.get(token)} there, {index} for the teacher: "
                "logits over another vocabulary are of no use (leave out --tokenizer)"
            )
    return hashlib.sha256(data).hexdigest(), max(theirs.values()) + 1


def spelled(student: Any, words: str) -> list[int]:
    """Returns the ids of an answer in training (`Tokenizer.encode_answers` of geode_jax)."""
    own = student.encode("a", add_special_tokens=False).tokens[:1] or [""]
    space = "" if own[0].startswith("▁") else " "
    return student.encode(space + words, add_special_tokens=False).ids


def prompt_ids(torch: Any, model: Any, tokenizer: Any, text: str, conversation: str) -> Any:
    """Returns ids [1, L] of upstream's prompt with the scene and one question."""
    from llava import constants
    from llava.conversation import conv_templates
    from llava.mm_utils import tokenizer_image_token

    picture = constants.DEFAULT_IMAGE_TOKEN
    if getattr(model.config, "mm_use_im_start_end", False):
        start, end = constants.DEFAULT_IM_START_TOKEN, constants.DEFAULT_IM_END_TOKEN
        picture = f"{start}{picture}{end}"
    if conversation not in conv_templates:
        raise job.InputError(f"--conversation: {conversation!r} is none of {list(conv_templates)}")
    talk = conv_templates[conversation].copy()
    talk.append_message(talk.roles[0], f"{picture}\n{text}")
    talk.append_message(talk.roles[1], None)
    ids = tokenizer_image_token(
        talk.get_prompt(), tokenizer, constants.IMAGE_TOKEN_INDEX, return_tensors="pt"
    )
    return ids[None].to(model.device)


def answer(torch: Any, model: Any, ids: Any, scene: dict, most: int) -> tuple[Any, Any]:
    """Returns the greedy answer: ids [T] and logits [T, X]."""
    torch.manual_seed(SEED)  # torch.randperm draws the voxels that are kept
    with torch.inference_mode():
        out = model.generate(
            ids,
            **scene,
            image_sizes=None,
            do_sample=False,
            num_beams=1,
            max_new_tokens=most,
            use_cache=True,
            output_scores=True,
            return_dict_in_generate=True,
        )
    logits = torch.cat(list(out.scores)).float()
    return out.sequences[0, -len(logits) :], logits


def top_logits(torch: Any, logits: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k most likely tokens of logits [T, X].

    Returns:
        Ids int32 [T, k], and float16 log-probabilities over the whole vocabulary, largest first.
    """
    # Log-probabilities include the logsumexp over all X, so it need not be stored.
    logprob, index = torch.topk(torch.log_softmax(logits, dim=-1), k, dim=-1)
    return index.cpu().numpy().astype(np.int32), logprob.cpu().numpy().astype(np.float16)


def relation_of(
    kinds: Any, tokenizer: Any, record: dict, top: tuple[np.ndarray, np.ndarray]
) -> dict[str, float] | None:
    """Returns {relation: probability of the first alternative} of a question, `teacher_relation`.

    It is the share of the first alternative in the probability of both, by the first token of the
    answer. An alternative may begin with a capital or a small letter.

    Args:
        kinds: module `kinds` of the contract.
        tokenizer: the teacher's.
        record: the question.
        top: result of `top_logits`; the first row is that of the answer's first token.

    Returns:
        None if the question is about none of the four relations, both alternatives begin with the
        same token, or neither is among the listed tokens.
    """
    words = kinds.alternatives(record)
    if words is None:
        return None
    index, logprob = (array[0] for array in top)

    def begins(word: str) -> set[int]:
        spelled = (word, word.capitalize())
        ids = {tokenizer(text, add_special_tokens=False).input_ids[0] for text in spelled}
        return ids - {getattr(tokenizer, "unk_token_id", None)}

    first = [begins(word) for word in words]
    if first[0] & first[1]:
        return None
    share = [np.exp(logprob[np.isin(index, list(ids))].astype(np.float64)).sum() for ids in first]
    return {record["kind"]: round(float(share[0] / sum(share)), 6)} if any(share) else None


def patch_features(
    torch: Any, model: Any, processor: Any, arrays: dict, grid: tuple[int, int], with_place: bool
) -> np.ndarray:
    """Returns features [V, gh, gw, F] of the export's own views, float16.

    They are the vision tower's patches of the whole picture (resized to the tower's square, not
    cropped), as area means over the export's patches. `with_place` adds the learned position
    embedding of the point that each patch sees.

    Raises:
        InputError: the scene lacks images, or true depth and cameras.
    """
    from PIL import Image

    needed = ["images"]
    if with_place:
        needed += ["target/depth", "camera/intrinsic", "camera/extrinsic"]
    for name in needed:
        if name not in arrays:
            raise job.InputError(f"the scene has no {name}, which --features needs")
    tower = model.get_vision_tower()
    side = tower.num_patches_per_side
    size = (processor["image"].crop_size["width"], processor["image"].crop_size["height"])
    bicubic = Image.Resampling.BICUBIC
    resized = [Image.fromarray(image).resize(size, bicubic) for image in arrays["images"]]
    pixels = np.stack([np.asarray(image, np.float32) / 255 for image in resized])
    pixels = (pixels - processor["image"].image_mean) / processor["image"].image_std
    given = torch.from_numpy(pixels.transpose(0, 3, 1, 2)).to(model.device, model.dtype)
    with torch.inference_mode():
        features = tower(given)
        features = features.reshape(len(features), side, side, -1)
        if with_place:
            depth = arrays["target/depth"].astype(np.float64)
            world = views.unprojected(depth, arrays["camera/intrinsic"], arrays["camera/extrinsic"])
            place = torch.from_numpy(views.nearest(world, (side, side))).to(features)
            encode = model.get_model().get_video_tower().video_tower.encode_pe
            features = features + encode(place[None])[0]
    return views.area_mean(features.float().cpu().numpy(), grid).astype(np.float16)


class Cost:
    """The teacher's time and memory, for the efficiency tables."""

    def __init__(self, torch: Any, model: Any, warm_up: int):
        """Takes the module, the model, and the number of first answers that are not counted."""
        self._torch, self._model, self._skip = torch, model, warm_up
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.reading: list[float] = []

    def now(self) -> float:
        """Returns the time in seconds, after all work on the device is done."""
        if self._torch.cuda.is_available():
            self._torch.cuda.synchronize()
        return time.perf_counter()

    def add(self, seconds: float, tokens: int) -> None:
        """Counts one answer."""
        if self._skip:
            self._skip -= 1
            return
        self.seconds.append(seconds)
        self.tokens.append(tokens)

    def summary(self) -> dict[str, Any]:
        """Returns figures named as in geode_jax/measure/cost.py; times are None without answers."""
        parameters = list(self._model.parameters())
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found: dict[str, Any] = {
            "parameters": sum(p.numel() for p in parameters),
            "bytes": sum(p.numel() * p.element_size() for p in parameters),
            "peak_memory_bytes": resident if sys.platform == "darwin" else resident * 1024,
            "device": "cpu",
            "dtype": str(parameters[0].dtype).replace("torch.", ""),
            "batch": 1,
            "samples": len(self.seconds),
            "ms_per_sample": 1e3 * float(np.mean(self.seconds)) if self.seconds else None,
            "ms_per_sample_median": 1e3 * float(np.median(self.seconds)) if self.seconds else None,
            "tokens_per_answer": float(np.mean(self.tokens)) if self.tokens else None,
            "ms_reading_a_scene": 1e3 * float(np.mean(self.reading)) if self.reading else None,
            "measured": "prompt to answer, greedy, with logits kept; reading frames is apart",
        }
        if self._torch.cuda.is_available():
            found["device"] = self._torch.cuda.get_device_name()
            found["peak_device_memory_bytes"] = self._torch.cuda.max_memory_allocated()
        return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the command's arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    job.add_arguments(parser)
    parser.add_argument(
        "--export", required=True, type=Path, help="export with scenes and questions"
    )
    parser.add_argument(
        "--videos", required=True, type=Path, help="folder of videos SCENE, as LLaVA-3D reads them"
    )
    parser.add_argument("--model", default="ChaimZhu/LLaVA-3D-7B", help="model name or folder")
    parser.add_argument(
        "--conversation", default="llava_v1", help="conversation template (%(default)s)"
    )
    parser.add_argument(
        "--suffix", default="", help="text added to every question as its last line"
    )
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument(
        "--tokenizer", type=Path, help="student's tokenizer; with the same ids, logits are stored"
    )
    parser.add_argument("--topk", type=int, default=16, help="logits stored per token")
    parser.add_argument(
        "--features", default="none", choices=("none", "2d", "3d"), help="patch features"
    )
    parser.add_argument(
        "--efficiency", type=Path, help="JSON file that gets times, bytes and memory"
    )
    parser.add_argument("--warm-up", type=int, default=1, help="answers before times are measured")
    parser.add_argument("--licence", default=LICENCE, help="licence of the model")
    parser.add_argument(
        "--commit", default="", help="commit of the checkout, if git does not know it"
    )
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    if min(args.topk, args.max_new_tokens) < 1 or args.warm_up < 0:
        raise job.InputError("needs --topk and --max-new-tokens above 0, --warm-up not below")
    return args


def header_of(args: argparse.Namespace, base: Any, commit: str, tokenizer: str) -> dict:
    """Returns the header of the new export."""
    producer = dict(base.manifest["producer"])
    producer["licence"] += f"; teacher: {args.licence}"
    producer.update({"teacher": job.name_of(args.model), "teacher_commit": commit})
    kept = ("dtype", "scale", "token_width", "patch_grid", "tokens_contain_depth", "categories")
    header = {name: base.manifest[name] for name in kept}
    if tokenizer:
        header["teacher_tokenizer"] = tokenizer
    notes = (
        f"Teacher LLaVA-3D: greedy, template {args.conversation}, suffix {args.suffix!r}, voxels "
        f"drawn with seed {SEED}, at most {args.max_new_tokens} tokens; its own frames, not the "
        f"export's views. Patch features: {args.features}, of the export's views, whole pictures."
    )
    notes = f"{base.manifest['notes']} {notes}".strip()
    return {**header, "producer": producer, "notes": notes}


class Teacher:
    """LLaVA-3D, which answers the questions about the scenes of an export."""

    def __init__(self, args: argparse.Namespace, base: Any, questions: dict[str, list[dict]]):
        """Loads the model.

        Args:
            args: the command's arguments.
            base: the export with the scenes.
            questions: {scene: its records in order}.

        Raises:
            InputError: not in LLaVA-3D's environment, or the tokenizer is not the teacher's.
        """
        try:
            import llava
            import torch
            from llava.mm_utils import get_model_name_from_path
            from llava.model.builder import load_pretrained_model
            from tokenizers import Tokenizer
        except ImportError as error:
            raise job.InputError(f"not in LLaVA-3D's environment: {error}") from None
        self._args, self._base, self._questions, self._torch = args, base, questions, torch
        contract = job.load_contract(args.contract)
        self._prompts, self._kinds = contract.prompts, contract.kinds
        commit = job.commit_of(llava, args.commit)
        self._tokenizer, self._model, self._processor, _ = load_pretrained_model(
            args.model, None, get_model_name_from_path(args.model), device=args.device
        )
        self._model.eval()
        digest, self._size, self._student = "", None, None
        if args.tokenizer:
            digest, self._size = same_tokenizer(contract, self._tokenizer, args.tokenizer)
            self._student = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
        self.header = header_of(args, base, commit, digest)
        self.cost = Cost(torch, self._model, args.warm_up)

    def read_video(self, scene_id: str) -> dict:
        """Returns a scene as read by LLaVA-3D's own reader.

        Raises:
            InputError: the reader does not know the scene.
        """
        from llava.mm_utils import process_videos

        start, path = self.cost.now(), str(self._args.videos / scene_id)
        device, dtype = self._model.device, self._model.dtype
        try:
            video = process_videos(path, self._processor["video"], mode="random", device=device)
        except (KeyError, NotImplementedError) as error:
            # The reader finds a scene's cameras by the last two parts of the path.
            raise job.InputError(f"{path}: unknown to LLaVA-3D: {error!r}") from None
        names = ("images", "depths", "poses", "intrinsics")
        scene = {name: video[name].to(device, dtype) for name in names}
        self.cost.reading.append(self.cost.now() - start)
        return scene

    def ask(self, record: dict, video: dict) -> tuple[str, Any, Any]:
        """Returns the answer to a question, its ids [T] and their logits [T, X]."""
        args = self._args
        text = "\n".join(filter(None, (self._prompts.prompt(record), args.suffix)))
        start = self.cost.now()
        ids = prompt_ids(self._torch, self._model, self._tokenizer, text, args.conversation)
        tokens, logits = answer(self._torch, self._model, ids, video, args.max_new_tokens)
        self.cost.add(self.cost.now() - start, len(tokens))
        return self._tokenizer.decode(tokens, skip_special_tokens=True).strip(), tokens, logits

    def make(self, scene: job.Scene) -> job.Made:
        """Returns the scene with the teacher's answers; see `job.run`."""
        arrays = self._base.read_scene(scene.id)
        asked = self._questions.get(scene.id, [])
        video = self.read_video(scene.id) if asked else {}
        end = self._tokenizer.eos_token_id
        records, rows, answer_ids, top = [], [], [], []
        cut = empty = respelled = unclear = 0
        for row, record in enumerate(asked):
            words, tokens, logits = self.ask(record, video)
            record = {**record, "teacher_answer": words} if words else record
            best = top_logits(self._torch, logits[:, : self._size], self._args.topk)
            relation = relation_of(self._kinds, self._tokenizer, record, best)
            records.append({**record, "teacher_relation": relation} if relation else record)
            unclear += relation is None and self._kinds.alternatives(record) is not None
            empty += not words
            if int(tokens[-1]) != end:
                cut += 1  # unfinished answers are no targets for single tokens
            elif self._student and words:
                rows += [row] * len(tokens)
                answer_ids.append(tokens.cpu().numpy().astype(np.int32))
                top.append(best)
                respelled += [*spelled(self._student, words), end] != tokens.tolist()
        if rows:
            arrays["teacher/answer_question"] = np.array(rows, np.int32)
            arrays["teacher/answer_id"] = np.concatenate(answer_ids)
            arrays["teacher/topk_id"] = np.concatenate([index for index, _ in top])
            arrays["teacher/topk_logprob"] = np.concatenate([logprob for _, logprob in top])
        if self._args.features != "none":
            arrays["teacher/features"] = patch_features(
                self._torch,
                self._model,
                self._processor,
                arrays,
                self._base.patch_grid,
                self._args.features == "3d",
            )
        report = f"{len(asked)} answers, {len(rows)} tokens with logits"
        if cut or empty:
            report += f"; without logits: {cut} cut off, {empty} empty (no answer kept)"
        if unclear:
            report += f"; {unclear} relations without a probability (neither answer is likely)"
        if respelled:
            report += (
                f"; {respelled} spelled in other ids by the student: it cannot use their logits"
            )
        return job.Made(arrays, records, report, scene.source[0].get("alignment"))


def _main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    contract = job.load_contract(args.contract)
    base = contract.Export(args.export)
    if "teacher_tokenizer" in base.manifest:
        raise job.InputError(f"{args.export}: has a teacher's logits already")
    if args.features == "3d" and base.manifest["scale"] != "metric":
        raise job.InputError(f"--features 3d: {args.export} is not metric")
    questions: dict[str, list[dict]] = {}
    for record in base.questions():
        questions.setdefault(record["scene_id"], []).append(record)
    asked = base.manifest["questions"]
    scenes = [job.Scene(e["id"], e["split"], [e, asked]) for e in base.manifest["scenes"]]
    teachers: list[Teacher] = []

    def begin():
        teachers.append(Teacher(args, base, questions))
        return teachers[0].header, teachers[0].make

    code = job.run(args, contract, scenes, begin, base.questions)
    if args.efficiency and teachers:
        summary = {"model": job.name_of(args.model), **teachers[0].cost.summary()}
        contract.files.write_json(args.efficiency, summary)
    return code


main = job.guarded("export_llava3d", _main)

if __name__ == "__main__":
    sys.exit(main())
