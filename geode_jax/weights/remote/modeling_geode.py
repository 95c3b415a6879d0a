"""GEODE in PyTorch: InternViT and Qwen2 with a rationale module and a regression head.

    frames --InternViT--> features --projector--> visual tokens
                          features, points, cameras --rationale module--> rationale tokens
    [rationale tokens][visual tokens][question][bos][answer]; at <REG>, <3DBBOX> a value

InternViT and Qwen2 are those of transformers. `modeling_parts` has the shape letters; here also
F frames, I tokens of a frame, T = V * I tokens of a scene, C channels, G points of a scene,
M rationale tokens.
"""

import copy
import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    DynamicCache,
    InternVLVisionConfig,
    InternVLVisionModel,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
)

from .modeling_parts import (
    BOX_CODE,
    CrossAttention,
    Mlp,
    SceneModel,
    SpatialHead,
    before_end,
    causal,
    decode_boxes,
    positions_of,
)

_CACHE = (
    "cache" if "cache" in inspect.signature(Qwen2Model.forward).parameters else "past_key_values"
)
"""Name of Qwen2's cache argument in transformers: `cache` from 5.24 on."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BASE_UNIT = {
    **{"mm": 0.001, "cm": 0.01, "km": 1000.0, "m": 1.0, "ft": 0.3048, "in": 0.0254, "yd": 0.9144},
    **{"mm2": 1e-06, "cm2": 0.0001, "km2": 1000000.0, "m2": 1.0, "ft2": 0.09290304},
    **{"in2": 0.00064516, "yd2": 0.83612736, "items": 1.0},
}
DECIMALS = {"mm": 0, "cm": 0, "km": 4, "mm2": 0, "cm2": 0, "km2": 8, "items": 0}  # others: 1
LOG_VALUES = (math.log(0.01), 11.0)  # range of the logarithms of regressed values, in base units

VISION_SIZES: dict[str, Any] = {"attention_bias": True}  # the others are InternViT-300M's already
TEXT_SIZES: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 8960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
DRM_SIZES = {
    "width": 1024,
    "heads": 16,
    "layers": 2,
    "slots": 16,
    "bands": 8,
    "visual_width": 1024,
    "point_width": 512,
    "llm_width": 1536,
    "max_frames": 16,
    "condition_on_question": False,
    "frames": 0,
}


class GeodeConfig(PretrainedConfig):
    """Sizes of the parts; the defaults are those of `configs/geode_joint.py:full`.

    Args:
        vision_config, text_config: sizes of InternViT and of Qwen2.
        drm: sizes of the rationale module; None: the model has none.
        drh_width: inner width of the regression head; 0: numbers are written as text.
        patch_grid: (rows, columns) of the known places of a view.
        categories, views: sizes of the parts that replaced pretrained ones in training; 0: none.
        prefix: parts in front of the text, a subset of "spatio" and "visual".
        reg_token_id, box_token_id: ids of `<REG>` and `<3DBBOX>`, if there is a regression head.
        answer_length: maximum number of tokens of an answer.
    """

    model_type = "geode"
    # transformers declares a property of the class and reads a dict.
    sub_configs = {  # noqa: RUF012  # pyright: ignore[reportAssignmentType]
        "vision_config": InternVLVisionConfig,
        "text_config": Qwen2Config,
    }

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        drm=DRM_SIZES,
        drh_width=1536,
        patch_grid=(37, 37),
        categories=0,
        views=0,
        prefix=("spatio", "visual"),
        reg_token_id=None,
        box_token_id=None,
        answer_length=32,
        **kwargs,
    ):
        if not isinstance(vision_config, InternVLVisionConfig):
            vision_config = InternVLVisionConfig(**(vision_config or VISION_SIZES))
        if not isinstance(text_config, Qwen2Config):
            text_config = Qwen2Config(**(text_config or TEXT_SIZES))
        self.vision_config, self.text_config = vision_config, text_config
        self.drm = None if drm is None else dict(drm)
        self.drh_width = drh_width
        self.patch_grid = patch_grid
        self.categories = categories
        self.views = views
        self.prefix = prefix
        self.reg_token_id = reg_token_id
        self.box_token_id = box_token_id
        self.answer_length = answer_length
        super().__init__(**kwargs)


class Projector(nn.Module):
    """InternVL's projector: four neighbouring patches become one token of the decoder's width."""

    def __init__(self, vision_width, width):
        super().__init__()
        self.layer_norm = nn.LayerNorm(4 * vision_width)
        self.linear_1 = nn.Linear(4 * vision_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features):
        """Returns tokens [F, I / 4, D] of patches [F, I, C], which are row-major on a square."""
        side = math.isqrt(features.shape[1])
        x = features.unflatten(1, (side // 2, 2, side // 2, 2)).permute(0, 1, 3, 2, 4, 5)
        x = self.layer_norm(x.flatten(3).flatten(1, 2))
        return self.linear_2(nn.functional.gelu(self.linear_1(x)))


# --- the rationale module -------------------------------------------------------------------------


def fourier_code(place, bands):
    """Returns the Fourier code [..., 3 + 6 * bands] of places [..., 3] in metres.

    The period of the lowest band is 16 m.
    """
    octaves = 2.0 ** torch.arange(bands, device=place.device)
    angle = (place[..., None] * (2 * torch.pi / 16 * octaves)).flatten(-2)
    return torch.cat([place / 4, angle.sin(), angle.cos()], dim=-1)


def camera_code(extrinsic, bands):
    """Returns the code [..., 9 + 3 + 6 * bands] of camera-from-world poses [..., 3, 4].

    The code is the rotation and the Fourier code of the camera's place.
    """
    rotation = extrinsic[..., :3]
    centre = -torch.einsum("...ji,...j->...i", rotation, extrinsic[..., 3])
    return torch.cat([rotation.flatten(-2), fourier_code(centre, bands)], dim=-1)


def spread(mask, most):
    """Returns a mask [S, V] that keeps at most `most` True entries of a row, evenly spread."""
    order = mask.cumsum(dim=1) - 1
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return mask & ((order * most) % count < most)


class MambaMixer(nn.Module):
    """Mamba-1: short convolution and gated selective scan, with the names of `mamba_ssm`.

    The scan is a loop over the positions in float32, which runs on any device but is slow for long
    rows.
    """

    def __init__(self, width, states=16, taps=4):
        super().__init__()
        inner, self.rank, self.states = 2 * width, math.ceil(width / 16), states
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, taps, groups=inner, padding=taps - 1)
        self.x_proj = nn.Linear(inner, self.rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.zeros(inner, states))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        x = nn.functional.silu(self.conv1d(x.mT)[..., : x.shape[1]].mT)
        delta, b, c = self.x_proj(x).float().split([self.rank, self.states, self.states], dim=-1)
        dt = self.dt_proj
        delta = nn.functional.linear(delta, dt.weight.float(), dt.bias.float())
        delta, u, a = nn.functional.softplus(delta), x.float(), -self.A_log.float().exp()
        state, out = u.new_zeros(len(u), *a.shape), []
        for t in range(u.shape[1]):
            state = (delta[:, t, :, None] * a).exp() * state
            state = state + (delta[:, t] * u[:, t])[..., None] * b[:, t, None]
            out.append((state * c[:, t, None]).sum(dim=-1))
        y = (torch.stack(out, dim=1) + self.D.float() * u).to(x.dtype)
        return self.out_proj(y * nn.functional.silu(gate))


class MambaBlock(nn.Module):
    """Computes x + mixer(norm(x))."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.mixer = MambaMixer(width)

    def forward(self, x):
        return x + self.mixer(self.norm(x))


class SceneArrays(NamedTuple):
    """The arrays of S scenes; the names in quotes are those of the array contract.

    Attributes:
        images: uint8 [S, V, h, w, 3], `images`; resized to the encoder's square.
        view_mask: bool [S, V], False = padding view (padding comes last).
        places: [S, V, P, 3], the point that each patch of `patch_grid` shows, metres.
        places_mask: bool [S, V, P], False = unknown.
        points: [S, G, C], `sonata/features`.
        coords: [S, G, 3], `sonata/coord`: metres, z up, centred in x and y, floor at 0.
        point_mask: bool [S, G], False = padding.
        extrinsic: [S, V, 3, 4], `camera/extrinsic`, camera-from-world.
        point_frame: int [S, G], `sonata/frame`, -1 = unknown; needed if `drm["frames"]` is set.
    """

    images: torch.Tensor
    view_mask: torch.Tensor
    places: torch.Tensor
    places_mask: torch.Tensor
    points: torch.Tensor
    coords: torch.Tensor
    point_mask: torch.Tensor
    extrinsic: torch.Tensor
    point_frame: torch.Tensor | None = None


class Drm(nn.Module):
    """The rationale module: M tokens that describe the contents of a room and their places."""

    def __init__(self, c, visual_width, llm_width):
        super().__init__()
        width, place = c["width"], 3 + 6 * c["bands"]
        self.bands, self.frames = c["bands"], c["frames"]
        self.visual_norm = nn.LayerNorm(visual_width)
        self.visual = Mlp(visual_width + place + 1, width, width)
        self.frame_embedding = nn.Parameter(torch.zeros(c["max_frames"], width))
        self.point = Mlp(c["point_width"] + place, width, width)
        self.camera = Mlp(9 + place, width, width)
        self.context_norm = nn.LayerNorm(width)
        self.fuse = CrossAttention(width, c["heads"], width // c["heads"])
        self.slots = nn.Parameter(torch.zeros(c["slots"], width))
        if c["condition_on_question"]:
            self.question = nn.Linear(llm_width, width)
        self.mamba = nn.ModuleList(MambaBlock(width) for _ in range(c["layers"]))
        self.state_norm = nn.RMSNorm(width, eps=1e-5)
        self.readout = CrossAttention(width, c["heads"], width // c["heads"])
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = Mlp(width, 2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, llm_width)

    def forward(self, features, scene, places, places_mask, question=None, question_mask=None):
        """Returns rationale tokens [S, M, D] of the decoder's width D.

        Args:
            features: the encoder's [S, V, I, C], without class tokens.
            scene: `SceneArrays`, for their points and cameras.
            places: [S, V, I, 3], the place that each of the encoder's tokens shows.
            places_mask: bool [S, V, I], False = unknown.
            question: embeddings [S, L, D], if the module is conditioned on the question.
            question_mask: bool [S, L], False = padding.
        """
        camera_mask, point_mask = scene.view_mask, scene.point_mask
        if self.frames:
            camera_mask = spread(camera_mask, self.frames)
            frame = scene.point_frame.long()
            point_mask = point_mask & (frame >= 0) & camera_mask.gather(1, frame.clamp(min=0))
            places_mask = places_mask & camera_mask[..., None]
        x = self._visual(features, places, places_mask)
        x = self._fused(x, scene, camera_mask, point_mask)
        valid = scene.view_mask.repeat_interleave(features.shape[2], dim=1)
        if question is not None and question_mask is not None:
            x = torch.cat([x, self.question(question)], dim=1)
            valid = torch.cat([valid, question_mask], dim=1)
        # Mamba reads from left to right, so padding at the end of a row changes nothing before it.
        order = (~valid).int().argsort(dim=1, stable=True)
        x = x.gather(1, order[..., None].expand_as(x))
        for block in self.mamba:
            x = block(x)
        slots = self.slots.expand(len(x), -1, -1).to(x.dtype)
        context = self.readout.keys_values(self.state_norm(x))
        slots = self.readout(slots, context, valid.gather(1, order))
        slots = slots + self.mlp(self.mlp_norm(slots))
        return self.project(self.norm(slots))

    def _visual(self, features, places, places_mask):
        """Returns F_2D [S, T, width], which codes the content of each token and its place."""
        known = places_mask[..., None].to(features.dtype)
        place = fourier_code(places.float(), self.bands).to(features.dtype) * known
        x = self.visual(torch.cat([self.visual_norm(features), place, known], dim=-1))
        return (x + self.frame_embedding[: x.shape[1], None]).flatten(1, 2)

    def _fused(self, x, scene, camera_mask, point_mask):
        """Returns F_2D + cross-attention to cameras and points."""
        coord = fourier_code(scene.coords.float(), self.bands).to(x.dtype)
        points = self.point(torch.cat([scene.points.to(x.dtype), coord], dim=-1))
        cameras = self.camera(camera_code(scene.extrinsic.float(), self.bands).to(x.dtype))
        context = self.fuse.keys_values(self.context_norm(torch.cat([cameras, points], dim=1)))
        return self.fuse(x, context, torch.cat([camera_mask, point_mask], dim=1))


# --- the whole ------------------------------------------------------------------------------------


class Drh(nn.Module):
    """The regression head: it decodes the state at a control token to a value."""

    def __init__(self, width, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.scalar = Mlp(width, hidden, 1)
        self.box = Mlp(width, hidden, BOX_CODE)

    def values(self, state):
        """Returns values [...] in base units (metres, square metres, items) of states [..., D]."""
        code = self.scalar(self.norm(state)).float()[..., 0]
        return code.clamp(*LOG_VALUES).exp()

    def boxes(self, state):
        """Returns boxes [..., 7] of states [..., D]: centre, size, yaw; metres, world frame."""
        return decode_boxes(self.box(self.norm(state)).float())


class Layout(nn.Module):
    """Columns of a room's layout, which replaced a pretrained text encoder in training on rooms."""

    def __init__(self, categories, views, width):
        super().__init__()
        self.slots = nn.Parameter(torch.zeros(categories, width))
        self.facts = nn.Linear(14 + views, width)


class Scene(NamedTuple):
    """S encoded scenes, as all of their questions share them.

    Attributes:
        cache: keys and values of the columns in front of the text; None: there are none.
        mask: bool [S, columns], False = padding.
    """

    cache: DynamicCache | None
    mask: torch.Tensor


class Answers(NamedTuple):
    """Greedy answers.

    Attributes:
        tokens: [S, Q, A]; the end token also fills a row behind its end.
        values: [S, Q, A], the regression head's value at each token, in base units; None without
            the head.
        boxes: [S, Q, A, 7], the regression head's box at each token; None without the head.
    """

    tokens: torch.Tensor
    values: torch.Tensor | None
    boxes: torch.Tensor | None


class GeodeModel(SceneModel):
    """GEODE; `SceneArrays` lists the arrays that `encode_scene` takes."""

    config_class = GeodeConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        c, width = config, config.text_config.hidden_size
        visual_width = c.vision_config.hidden_size
        self.vision_tower = InternVLVisionModel(c.vision_config)
        self.multi_modal_projector = Projector(visual_width, width)
        self.language_model = Qwen2ForCausalLM(c.text_config)
        self.drm = Drm(c.drm, visual_width, width) if c.drm else None
        self.drh = Drh(width, c.drh_width) if c.drh_width else None
        if c.categories:
            # Read in training alone.
            self.layout = Layout(c.categories, c.views, width)
            self.spatial_head = SpatialHead(width)
            self.patch_classifier = nn.Linear(visual_width, c.categories + 1)
        self.post_init()

    # --- the scene, once for all its questions ---

    def encode_scene(self, prefix=None, input_ids=None, attention_mask=None, **arrays):
        """Returns a `Scene`: the columns in front of the text of S scenes.

        Args:
            prefix: parts of the prefix; None: those of the config. ("spatio",) makes the model
                write rationales.
            input_ids: as in `forward`; needed if the rationale module is conditioned on the
                question, and then each scene's first question is read.
            attention_mask: as in `forward`, with `input_ids`.
            arrays: the fields of `SceneArrays`.
        """
        scene = SceneArrays(**arrays)
        parts = self.config.prefix if prefix is None else prefix
        if not parts:
            return Scene(None, scene.view_mask[:, :0])
        columns, masks = [], []
        features = self._features(scene.images)
        if "spatio" in parts:
            columns.append(self._rationale(features, scene, input_ids, attention_mask))
            has_views = scene.view_mask.any(dim=1, keepdim=True)
            masks.append(has_views.expand(-1, columns[-1].shape[1]))
        if "visual" in parts:
            tokens = self.multi_modal_projector(features[:, :, 1:].flatten(0, 1))
            columns.append(tokens.unflatten(0, features.shape[:2]).flatten(1, 2))
            masks.append(scene.view_mask.repeat_interleave(tokens.shape[1], dim=1))
        x, mask, cache = torch.cat(columns, dim=1), torch.cat(masks, dim=1), DynamicCache()
        self._run(x, positions_of(mask), causal(mask), cache)
        return Scene(cache, mask)

    def _features(self, images):
        """Returns the encoder's hidden states [S, V, 1 + I, C] of all frames."""
        pixels = images.flatten(0, 1).float() / 255
        pixels, size = pixels.permute(0, 3, 1, 2), tuple(self.config.vision_config.image_size)
        if pixels.shape[2:] != size:
            pixels = nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
            pixels = pixels.clamp(0, 1)
        mean, std = (pixels.new_tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
        hidden = self.vision_tower(((pixels - mean) / std).to(self.dtype)).last_hidden_state
        return hidden.unflatten(0, images.shape[:2])

    def _rationale(self, features, scene, input_ids, attention_mask):
        if self.drm is None:
            raise ValueError('prefix: this model has no rationale module, so no part "spatio"')
        side, (rows, columns) = math.isqrt(features.shape[2] - 1), self.config.patch_grid
        # A token has the place of the patch at its centre.
        centre = torch.arange(side, device=features.device) + 0.5
        row, column = ((centre * size // side).long() for size in (rows, columns))
        here = (row[:, None] * columns + column).flatten()
        question, mask = None, None
        if self.config.drm["condition_on_question"]:
            question = self.language_model.model.embed_tokens(input_ids[:, 0])
            mask = attention_mask[:, 0].bool()
        return self.drm(
            features[:, :, 1:],
            scene,
            scene.places[:, :, here],
            scene.places_mask[:, :, here],
            question,
            mask,
        )

    # --- the questions ---

    def _embed(self, ids):
        return self.language_model.model.embed_tokens(ids)

    def _logits(self, states):
        return self.language_model.lm_head(states)

    def _prefix(self, scene, questions):
        cache = DynamicCache() if scene.cache is None else copy.deepcopy(scene.cache)
        cache.batch_repeat_interleave(questions)
        return cache, scene.mask.repeat_interleave(questions, dim=0)

    def _run(self, x, positions, visible, cache, scene=None):
        bias = torch.zeros(visible.shape, dtype=x.dtype, device=x.device)
        bias = bias.masked_fill(~visible, torch.finfo(x.dtype).min)
        out = self.language_model.model(
            inputs_embeds=x,
            attention_mask=bias[:, None],
            position_ids=positions,
            **{_CACHE: cache},  # appended to in place
            use_cache=True,
        )
        return out.last_hidden_state, cache

    @torch.no_grad()
    def answer(self, scene, input_ids, attention_mask, max_new_tokens=None):
        """Returns greedy `Answers`.

        Args:
            scene, input_ids, attention_mask: as in `forward`.
            max_new_tokens: maximum length of an answer; None: `answer_length` of the config.
        """
        tokens, states = self._generate(scene, input_ids, attention_mask, max_new_tokens)
        if self.drh is None:
            return Answers(tokens, None, None)
        return Answers(tokens, self.drh.values(states), self.drh.boxes(states))

    def decode_answers(self, answers, tokenizer, units=None):
        """Returns `Answers` as S lists of Q dicts.

        Args:
            answers: result of `answer`.
            tokenizer: the tokenizer of this folder.
            units: S lists of Q keys of `BASE_UNIT`; None for a question without a unit.

        Returns:
            Dicts with `text`, in which each control token is replaced by its value or box, and, if
            there are any, the last `value` (in the unit) and the last `box` (7 numbers).

        Raises:
            ValueError: an unknown unit.
        """
        unknown = {unit for row in units or () for unit in row} - {None, *BASE_UNIT}
        if unknown:
            raise ValueError(f"units: {sorted(unknown)} are none of {', '.join(BASE_UNIT)}")
        return [
            [
                self._decode_answer(answers, (s, q), tokenizer, units[s][q] if units else None)
                for q in range(answers.tokens.shape[1])
            ]
            for s in range(answers.tokens.shape[0])
        ]

    def _decode_answer(self, answers, place, tokenizer, unit):
        text, words, decoded = "", [], {}
        for i, token in enumerate(before_end(answers.tokens[place], self.config.eos_token_id)):
            if token not in (self.config.reg_token_id, self.config.box_token_id):
                words.append(token)
                continue
            text, words = text + tokenizer.decode(words, skip_special_tokens=True), []
            if token == self.config.reg_token_id:
                decoded["value"] = float(answers.values[place][i]) / BASE_UNIT.get(unit, 1.0)
                text += f" {decoded['value']:.{DECIMALS.get(unit, 1)}f}"
            else:
                decoded["box"] = answers.boxes[place][i].tolist()
                text += " " + " ".join(f"{x:.2f}" for x in decoded["box"])
        text += tokenizer.decode(words, skip_special_tokens=True)
        return {"text": text.strip()} | decoded
