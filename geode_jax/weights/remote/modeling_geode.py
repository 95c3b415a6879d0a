"""GEODE in PyTorch: InternViT and Qwen2 with a rationale module and a regression head.

    frames --InternViT--> features --projector--> visual tokens
                          features, points, cameras --rationale module--> rationale tokens
    [rationale tokens][visual tokens][question][bos][answer]; at <REG>, <3DBBOX> a value

InternViT and Qwen2 are those of transformers. See `modeling_parts` for the letters of shapes, here
also I tokens of a frame, T = V * I, G points of a scene, M rationale tokens.
"""

import copy
import inspect
import math
from typing import NamedTuple

import torch
from torch import nn
from transformers import (
    DynamicCache,
    InternVLVisionConfig,
    InternVLVisionModel,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
)

from .modeling_parts import (
    BOX_CODE,
    CrossAttention,
    Mlp,
    SpatialHead,
    before_end,
    causal,
    decode_boxes,
    encode_prompts,
    greedy,
    positions_of,
)

_CACHE = (
    "cache" if "cache" in inspect.signature(Qwen2Model.forward).parameters else "past_key_values"
)
"""What transformers calls the argument: from 5.24 on `cache`."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BASE_UNIT = {
    **{"mm": 0.001, "cm": 0.01, "km": 1000.0, "m": 1.0, "ft": 0.3048, "in": 0.0254, "yd": 0.9144},
    **{"mm2": 1e-06, "cm2": 0.0001, "km2": 1000000.0, "m2": 1.0, "ft2": 0.09290304},
    **{"in2": 0.00064516, "yd2": 0.83612736, "items": 1.0},
}
DECIMALS = {"mm": 0, "cm": 0, "km": 4, "mm2": 0, "cm2": 0, "km2": 8, "items": 0}  # others: 1
LOG_VALUES = (math.log(0.01), 11.0)  # of values that are regressed, in base units


class GeodeConfig(PretrainedConfig):
    """Sizes of the parts.

    Args:
        vision_config, text_config: InternViT's and Qwen2's.
        drm: sizes of the rationale module; None: there is none.
        drh_width: inner width of the regression head; 0: numbers are written as text.
        patch_grid: (rows, columns) of the places that a view has.
        categories, views: of what stood in for pretrained parts in training; 0: nothing did.
        prefix: what stands before the text, of "spatio" and "visual".
        reg_token_id, box_token_id: of `<REG>` and `<3DBBOX>`, where there is a regression head.
        answer_length: at most so many tokens in an answer.
    """

    model_type = "geode"
    sub_configs = {"vision_config": InternVLVisionConfig, "text_config": Qwen2Config}  # noqa: RUF012

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        drm=None,
        drh_width=0,
        patch_grid=(32, 32),
        categories=0,
        views=0,
        prefix=("spatio", "visual"),
        reg_token_id=None,
        box_token_id=None,
        answer_length=32,
        **kwargs,
    ):
        if not isinstance(vision_config, InternVLVisionConfig):
            vision_config = InternVLVisionConfig(**(vision_config or {}))
        if not isinstance(text_config, Qwen2Config):
            text_config = Qwen2Config(**(text_config or {}))
        self.vision_config, self.text_config = vision_config, text_config
        self.drm = drm
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
    """InternVL's: four neighbouring patches become one token of the decoder's width."""

    def __init__(self, vision_width, width):
        super().__init__()
        self.layer_norm = nn.LayerNorm(4 * vision_width)
        self.linear_1 = nn.Linear(4 * vision_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features):
        """Patches [N, I, C], row-major on a square, to tokens [N, I / 4, D]."""
        side = math.isqrt(features.shape[1])
        x = features.unflatten(1, (side // 2, 2, side // 2, 2)).permute(0, 1, 3, 2, 4, 5)
        x = self.layer_norm(x.flatten(3).flatten(1, 2))
        return self.linear_2(nn.functional.gelu(self.linear_1(x)))


# --- the rationale module -------------------------------------------------------------------------


def fourier_code(place, bands):
    """Places [..., 3] in metres as [..., 3 + 6 * bands]; the lowest band's period is 16 m."""
    octaves = 2.0 ** torch.arange(bands, device=place.device)
    angle = (place[..., None] * (2 * torch.pi / 16 * octaves)).flatten(-2)
    return torch.cat([place / 4, angle.sin(), angle.cos()], dim=-1)


def camera_code(extrinsic, bands):
    """Camera-from-world poses [..., 3, 4] as [..., 9 + 3 + 6 * bands]: axes and place."""
    rotation = extrinsic[..., :3]
    centre = -torch.einsum("...ji,...j->...i", rotation, extrinsic[..., 3])
    return torch.cat([rotation.flatten(-2), fourier_code(centre, bands)], dim=-1)


def spread(mask, most):
    """At most so many of every row's True entries [S, V], spread evenly."""
    order = mask.cumsum(dim=1) - 1
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return mask & ((order * most) % count < most)


class MambaMixer(nn.Module):
    """Mamba-1: short convolution and selective scan, gated; names are those of `mamba_ssm`.

    The scan is a loop over the positions, in float32: right everywhere, and slow for long rows.
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
    """x += mixer(norm(x))."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.mixer = MambaMixer(width)

    def forward(self, x):
        return x + self.mixer(self.norm(x))


class Scene(NamedTuple):
    """What is known of S scenes, under the names of the array contract.

    Attributes:
        images: uint8 [S, V, h, w, 3], `images`; squeezed to the encoder's square.
        view_mask: bool [S, V], False = padding view (these stand last).
        places: [S, V, P, 3], the point that is seen at each patch of `patch_grid`, metres.
        places_mask: bool [S, V, P], False = unknown.
        points: [S, G, C], `sonata/features`.
        coords: [S, G, 3], `sonata/coord`: metres, z up, centred in x and y, floor at 0.
        point_mask: bool [S, G], False = padding.
        extrinsic: [S, V, 3, 4], `camera/extrinsic`, camera-from-world.
        point_frame: int [S, G], `sonata/frame`, -1 = unknown; read where `drm["frames"]` is set.
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
    """The rationale module: M tokens that say what is where in a room."""

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
        """Rationale tokens [S, M, D of the decoder].

        Args:
            features: the encoder's [S, V, I, C], without class tokens.
            scene: points and cameras.
            places: [S, V, I, 3] of the encoder's tokens, and their mask.
            places_mask: see there.
            question: embeddings [S, L, D], where the module reads the question, and their mask.
            question_mask: see there.
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
        if question is not None:
            x = torch.cat([x, self.question(question)], dim=1)
            valid = torch.cat([valid, question_mask], dim=1)
        # Mamba reads from left to right: what is not there does no harm at the end of the row.
        order = (~valid).int().argsort(dim=1, stable=True)
        x = x.gather(1, order[..., None].expand_as(x))
        for block in self.mamba:
            x = block(x)
        slots = self.slots.expand(len(x), -1, -1).to(x.dtype)
        slots = self.readout(slots, self.readout.see(self.state_norm(x)), valid.gather(1, order))
        slots = slots + self.mlp(self.mlp_norm(slots))
        return self.project(self.norm(slots))

    def _visual(self, features, places, places_mask):
        """F_2D [S, T, width]: what a token shows, and where that is."""
        known = places_mask[..., None].to(features.dtype)
        place = fourier_code(places.float(), self.bands).to(features.dtype) * known
        x = self.visual(torch.cat([self.visual_norm(features), place, known], dim=-1))
        return (x + self.frame_embedding[: x.shape[1], None]).flatten(1, 2)

    def _fused(self, x, scene, camera_mask, point_mask):
        """F_2D + cross-attention to cameras and points."""
        coord = fourier_code(scene.coords.float(), self.bands).to(x.dtype)
        points = self.point(torch.cat([scene.points.to(x.dtype), coord], dim=-1))
        cameras = self.camera(camera_code(scene.extrinsic.float(), self.bands).to(x.dtype))
        seen = self.fuse.see(self.context_norm(torch.cat([cameras, points], dim=1)))
        return self.fuse(x, seen, torch.cat([camera_mask, point_mask], dim=1))


# --- the whole ------------------------------------------------------------------------------------


class Drh(nn.Module):
    """The regression head: the state at a control token is a value."""

    def __init__(self, width, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.scalar = Mlp(width, hidden, 1)
        self.box = Mlp(width, hidden, BOX_CODE)

    def values(self, state):
        """Values [...] in base units (metres, square metres, items) of states [..., D]."""
        code = self.scalar(self.norm(state)).float()[..., 0]
        return code.clamp(*LOG_VALUES).exp()

    def boxes(self, state):
        """Boxes [..., 7] of states [..., D]: centre, size, yaw about z, metres, world frame."""
        return decode_boxes(self.box(self.norm(state)).float())


class Layout(nn.Module):
    """A layout's columns, which stood in for a text encoder in training on rooms."""

    def __init__(self, categories, views, width):
        super().__init__()
        self.slots = nn.Parameter(torch.zeros(categories, width))
        self.facts = nn.Linear(14 + views, width)


class Prefix(NamedTuple):
    """What all questions of S scenes see: keys and values, and which columns count, [S, P]."""

    cache: DynamicCache | None
    mask: torch.Tensor


class Answers(NamedTuple):
    """Greedy answers; from the end token on a row of `tokens` is filled with it.

    Attributes:
        tokens: [S, Q, A].
        values: [S, Q, A], what the regression head reads at each token, in base units; None
            without the head.
        boxes: [S, Q, A, 7], likewise.
    """

    tokens: torch.Tensor
    values: torch.Tensor | None
    boxes: torch.Tensor | None


class GeodeModel(PreTrainedModel):
    """See the file's docstring. Scenes come as arrays; see `Scene`."""

    config_class = GeodeConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        c, width = config, config.text_config.hidden_size
        seen = c.vision_config.hidden_size
        self.vision_tower = InternVLVisionModel(c.vision_config)
        self.multi_modal_projector = Projector(seen, width)
        self.language_model = Qwen2ForCausalLM(c.text_config)
        self.drm = Drm(c.drm, seen, width) if c.drm else None
        self.drh = Drh(width, c.drh_width) if c.drh_width else None
        if c.categories:
            # What only training reads.
            self.layout = Layout(c.categories, c.views, width)
            self.spatial_head = SpatialHead(width)
            self.patch_classifier = nn.Linear(seen, c.categories + 1)
        self.post_init()

    # --- the scene, once for all its questions ---

    def look(self, prefix=None, input_ids=None, attention_mask=None, **arrays):
        """The prefix of S scenes.

        Args:
            prefix: parts of it; None: those of the config. ("spatio",) writes rationales.
            input_ids: of `forward`, and `attention_mask`: where the rationale module reads the
                question, which is each scene's first.
            attention_mask: see there.
            arrays: the fields of `Scene`.

        Returns:
            A `Prefix`.
        """
        scene = Scene(**arrays)
        parts = self.config.prefix if prefix is None else prefix
        columns, masks = [], []
        features = self._features(scene.images) if parts else None
        if "spatio" in parts:
            columns.append(self._rationale(features, scene, input_ids, attention_mask))
            there = scene.view_mask.any(dim=1, keepdim=True)  # of no view nothing is known
            masks.append(there.expand(-1, columns[-1].shape[1]))
        if "visual" in parts:
            tokens = self.multi_modal_projector(features[:, :, 1:].flatten(0, 1))
            columns.append(tokens.unflatten(0, features.shape[:2]).flatten(1, 2))
            masks.append(scene.view_mask.repeat_interleave(tokens.shape[1], dim=1))
        if not columns:
            return Prefix(None, scene.view_mask[:, :0])
        x, mask, cache = torch.cat(columns, dim=1), torch.cat(masks, dim=1), DynamicCache()
        self._run(x, positions_of(mask), causal(mask), cache)
        return Prefix(cache, mask)

    def _features(self, images):
        """The encoder's hidden states [S, V, 1 + I, C] of all frames."""
        pixels = images.flatten(0, 1).float() / 255
        pixels, size = pixels.permute(0, 3, 1, 2), tuple(self.config.vision_config.image_size)
        if pixels.shape[2:] != size:
            pixels = nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
            pixels = pixels.clamp(0, 1)
        mean, std = (pixels.new_tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
        hidden = self.vision_tower(((pixels - mean) / std).to(self.dtype)).last_hidden_state
        return hidden.unflatten(0, images.shape[:2])

    def _rationale(self, features, scene, input_ids, attention_mask):
        side, (rows, columns) = math.isqrt(features.shape[2] - 1), self.config.patch_grid
        # The place of a token is that of the patch at its centre.
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

    def encode_prompts(self, tokenizer, prompts):
        """S lists of Q texts as `input_ids` and `attention_mask`, see `forward`."""
        ids, mask = encode_prompts(tokenizer, prompts, self.config.bos_token_id)
        return ids.to(self.device), mask.to(self.device)

    def forward(self, prefix, input_ids, attention_mask, answer_ids=None):
        """Logits [S, Q, L (+ A), vocabulary] of what follows every token.

        Args:
            prefix: of `look`.
            input_ids: [S, Q, L], each question and bos, left-padded.
            attention_mask: bool [S, Q, L], False = padding.
            answer_ids: [S, Q, A], answers behind them, for teacher forcing.
        """
        hidden, *_ = self._read(prefix, input_ids, attention_mask, answer_ids)
        return self.language_model.lm_head(hidden).unflatten(0, input_ids.shape[:2])

    def _run(self, x, positions, visible, cache):
        """Qwen2's states of embeddings [B, L, D] behind the cache, which grows."""
        bias = torch.zeros(visible.shape, dtype=x.dtype, device=x.device)
        bias = bias.masked_fill(~visible, torch.finfo(x.dtype).min)
        out = self.language_model.model(
            inputs_embeds=x,
            attention_mask=bias[:, None],
            position_ids=positions,
            **{_CACHE: cache},
            use_cache=True,
        )
        return out.last_hidden_state

    def _read(self, prefix, input_ids, attention_mask, answer_ids=None):
        """States [B, L (+ A), D], the cache behind them, the prefix's mask and the text's."""
        questions = input_ids.shape[1]
        ids, shown = input_ids.flatten(0, 1), attention_mask.flatten(0, 1).bool()
        if answer_ids is not None:
            answer = answer_ids.flatten(0, 1)
            ids = torch.cat([ids, answer], dim=1)
            shown = torch.cat([shown, torch.ones_like(answer, dtype=torch.bool)], dim=1)
        before = prefix.mask.repeat_interleave(questions, dim=0)
        cache = DynamicCache() if prefix.cache is None else copy.deepcopy(prefix.cache)
        cache.batch_repeat_interleave(questions)
        visible = torch.cat([before[:, None].expand(-1, ids.shape[1], -1), causal(shown)], dim=-1)
        positions = before.sum(dim=1, keepdim=True) + positions_of(shown)
        embeddings = self.language_model.model.embed_tokens(ids)
        return self._run(embeddings, positions, visible, cache), cache, before, shown

    @torch.no_grad()
    def answer(self, prefix, input_ids, attention_mask, max_new_tokens=None):
        """Greedy `Answers`.

        Args:
            prefix, input_ids, attention_mask: as of `forward`.
            max_new_tokens: at most; None: `answer_length` of the config.
        """
        hidden, cache, before, shown = self._read(prefix, input_ids, attention_mask)

        def advance(token):
            nonlocal shown
            shown = torch.cat([shown, torch.ones_like(shown[:, :1])], dim=1)
            visible = torch.cat([before, shown], dim=1)
            state = self._run(
                self.language_model.model.embed_tokens(token[:, None]),
                before.sum(dim=1, keepdim=True) + positions_of(shown)[:, -1:],
                visible[:, None],
                cache,
            )
            return state[:, 0]

        tokens, states = greedy(
            self.language_model.lm_head,
            advance,
            hidden[:, -1],
            ~shown.any(dim=1),
            self.config.eos_token_id,
            max_new_tokens or self.config.answer_length,
        )
        tokens, states = (x.unflatten(0, input_ids.shape[:2]) for x in (tokens, states))
        if self.drh is None:
            return Answers(tokens, None, None)
        return Answers(tokens, self.drh.values(states), self.drh.boxes(states))

    def say(self, answers, tokenizer, units=None):
        """`Answers` as S lists of Q dicts.

        Args:
            answers: of `answer`.
            tokenizer: of this folder.
            units: S lists of Q units of `BASE_UNIT`, or None where a question has none.

        Returns:
            Dicts of `text`, in which a value or a box stands for its control token, and `value`
            (in the unit) and `box` (7 numbers) of the last of each, where there is one.

        Raises:
            ValueError: an unknown unit.
        """
        unknown = {unit for row in units or () for unit in row} - {None, *BASE_UNIT}
        if unknown:
            raise ValueError(f"units: {sorted(unknown)} are not of {', '.join(BASE_UNIT)}")
        return [
            [
                self._say(answers, (s, q), tokenizer, units[s][q] if units else None)
                for q in range(answers.tokens.shape[1])
            ]
            for s in range(answers.tokens.shape[0])
        ]

    def _say(self, answers, place, tokenizer, unit):
        text, words, said = "", [], {}
        for i, token in enumerate(before_end(answers.tokens[place], self.config.eos_token_id)):
            if token not in (self.config.reg_token_id, self.config.box_token_id):
                words.append(token)
                continue
            text, words = text + tokenizer.decode(words, skip_special_tokens=True), []
            if token == self.config.reg_token_id:
                said["value"] = float(answers.values[place][i]) / BASE_UNIT.get(unit, 1.0)
                text += f" {said['value']:.{DECIMALS.get(unit, 1)}f}"
            else:
                said["box"] = answers.boxes[place][i].tolist()
                text += " " + " ".join(f"{x:.2f}" for x in said["box"])
        text += tokenizer.decode(words, skip_special_tokens=True)
        return {"text": text.strip()} | said
