"""The Hidden-CoT student in PyTorch: [V][T1..TK][question][bos][answer] over VGGT features.

A scene's vision tokens become features Z, one token V, and K learned thinking tokens T that are
never decoded. T is seen from bos on, which opens the answer, and not by the question. See
`modeling_parts` for the letters of shapes.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .modeling_parts import (
    BOX_CODE,
    Attention,
    CrossAttention,
    Mlp,
    SpatialHead,
    attend,
    before_end,
    causal,
    decode_boxes,
    encode_prompts,
    greedy,
    positions_of,
    rotary_angles,
    rotate,
)

NEAREST, FARTHEST = 0.3, 10.0  # metres; centres of the outer depth bins


class HiddenCotConfig(PretrainedConfig):
    """Sizes of the student; the defaults are the paper's.

    Args:
        vision_width, camera_width: of VGGT's tokens; 0 = no camera tokens.
        patch_grid: (rows, columns) of patches of a view.
        max_views: size of the view embedding.
        thinking_tokens: K.
        vision_prefix: number of V tokens.
        cross_attention_layers: those that look at Z first.
        heads: sizes of the depth, detection and feature heads.
        category_ids: token ids of every category's noun.
        answer_length: at most so many tokens in an answer.
    """

    model_type = "hidden_cot"

    def __init__(
        self,
        vocab_size=32_000,
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
        intermediate_size=8192,
        layer_norm_eps=1e-5,
        rope_theta=10_000.0,
        qkv_bias=True,
        linear_bias=True,
        cross_attention_layers=(),
        vision_width=2048,
        camera_width=0,
        patch_grid=(37, 37),
        max_views=8,
        projector_width=2048,
        thinking_tokens=8,
        vision_prefix=1,
        heads=None,
        category_ids=(),
        answer_length=32,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.layer_norm_eps = layer_norm_eps
        self.rope_theta = rope_theta
        self.qkv_bias = qkv_bias
        self.linear_bias = linear_bias
        self.cross_attention_layers = cross_attention_layers
        self.vision_width = vision_width
        self.camera_width = camera_width
        self.patch_grid = patch_grid
        self.max_views = max_views
        self.projector_width = projector_width
        self.thinking_tokens = thinking_tokens
        self.vision_prefix = vision_prefix
        self.heads = heads or {
            "width": 512,
            "depth_bins": 64,
            "depth_cells": 2,
            "queries": 64,
            "detection_layers": 3,
            "categories": 1,
            "teacher_width": 0,
        }
        self.category_ids = category_ids
        self.answer_length = answer_length
        super().__init__(**kwargs)


class DecoderLayer(nn.Module):
    """A look at Z, where the layer has one; causal self-attention; feed-forward; all pre-norm."""

    def __init__(self, c, cross):
        super().__init__()
        width, head = c.hidden_size, c.head_dim
        self.cross_attn = (
            CrossAttention(
                width, c.num_attention_heads, head, c.qkv_bias, c.linear_bias, c.layer_norm_eps
            )
            if cross
            else None
        )
        self.input_layernorm = nn.LayerNorm(width, eps=c.layer_norm_eps)
        self.self_attn = Attention(
            width, c.num_attention_heads, c.num_key_value_heads, head, c.qkv_bias, c.linear_bias
        )
        self.post_attention_layernorm = nn.LayerNorm(width, eps=c.layer_norm_eps)
        self.mlp = Mlp(width, c.intermediate_size, width, c.linear_bias)

    def forward(self, x, angles, visible, past, seen, seen_mask):
        if self.cross_attn is not None:
            x = self.cross_attn(x, seen, seen_mask)
        y = self.input_layernorm(x)
        query, key = (
            rotate(h, angles) for h in (self.self_attn.queries(y), self.self_attn.keys(y))
        )
        value = self.self_attn.values(y)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=1), torch.cat([past[1], value], dim=1)
        x = x + self.self_attn.merge(attend(query, key, value, visible))
        return x + self.mlp(self.post_attention_layernorm(x)), (key, value)


class Decoder(nn.Module):
    """The trunk."""

    def __init__(self, c):
        super().__init__()
        self.head_width, self.theta = c.head_dim, c.rope_theta
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(c, i in c.cross_attention_layers) for i in range(c.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def see(self, z):
        """Keys and values of Z [S, M, D] for every layer that looks."""
        return [None if x.cross_attn is None else x.cross_attn.see(z) for x in self.layers]

    def forward(self, x, positions, visible, past, seen, seen_mask):
        """Embeddings [B, L, D] behind `past`, one (keys, values) a layer, which grows.

        Args:
            x: embeddings.
            positions: [B, L].
            visible: bool [B, L, columns of the past + L].
            past: None at the start.
            seen: of `see`, and `seen_mask` bool [S, M].

        Returns:
            Normed states [B, L, D] and the past of what follows.
        """
        angles = rotary_angles(positions, self.head_width, self.theta)
        grown = []
        for i, layer in enumerate(self.layers):
            x, keys_values = layer(
                x, angles, visible, None if past is None else past[i], seen[i], seen_mask
            )
            grown.append(keys_values)
        return self.norm(x), grown


class DepthHead(nn.Module):
    """Bins of log depth for the r x r cells of every patch."""

    def __init__(self, width, heads):
        super().__init__()
        self.cells, self.bins = heads["depth_cells"], heads["depth_bins"]
        self.mlp = Mlp(width, heads["width"], self.cells**2 * self.bins)

    def forward(self, z, grid):
        """Features [S, V, P, D] to the expected depth [S, V, h, w] in metres, (h, w) = r * grid."""
        r = self.cells
        x = self.mlp(z).unflatten(-1, (r, r, self.bins)).unflatten(2, tuple(grid))
        x = x.permute(0, 1, 2, 4, 3, 5, 6).flatten(4, 5).flatten(2, 3)
        # The mean is taken in log depth, where the bins are even.
        near, far = math.log(NEAREST), math.log(FARTHEST)
        centres = torch.linspace(near, far, self.bins, device=x.device)
        return (x.float().softmax(dim=-1) * centres).sum(dim=-1).exp()


class QueryLayer(nn.Module):
    """Object queries attend to the scene's features, then to each other, then through an MLP."""

    def __init__(self, width, heads):
        super().__init__()
        self.look, self.talk = (
            Attention(width, heads, heads, width // heads, bias=False) for _ in range(2)
        )
        self.mlp = Mlp(width, 2 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, x, places, z, visible):
        y = self.norms[0](x) + places
        look, talk = self.look, self.talk
        x = x + look.merge(attend(look.queries(y), look.keys(z), look.values(z), visible))
        y = self.norms[1](x)
        everyone = visible.new_ones(len(x), 1, x.shape[1])
        x = x + talk.merge(attend(talk.queries(y + places), talk.keys(y), talk.values(y), everyone))
        return x + self.mlp(self.norms[2](x))


class DetectionHead(nn.Module):
    """Set prediction of oriented boxes by learned object queries."""

    def __init__(self, width, heads):
        super().__init__()
        w = heads["width"]
        self.reduce = nn.Linear(width, w)
        self.places = nn.Parameter(torch.zeros(heads["queries"], w))
        self.layers = nn.ModuleList(QueryLayer(w, 4) for _ in range(heads["detection_layers"]))
        self.norm = nn.LayerNorm(w)
        self.classes = nn.Linear(w, heads["categories"])
        self.boxes = Mlp(w, w, BOX_CODE)

    def forward(self, z, seen_mask):
        """Features [S, M, D] to class logits [S, N, c] and boxes [S, N, 7]."""
        z, visible = self.reduce(z), seen_mask[:, None]
        x = z.new_zeros(len(z), *self.places.shape)
        for layer in self.layers:
            x = layer(x, self.places, z, visible)
        x = self.norm(x)
        return self.classes(x).float(), decode_boxes(self.boxes(x).float())


class Scene(NamedTuple):
    """Everything of S scenes that their questions share.

    Attributes:
        z: features [S, V, P, D], 0 at padding views.
        seen_mask: bool [S, V * P].
        seen: keys and values of Z for every layer that looks.
        prefix: keys and values of [V][T] for every layer.
        thinking: states [S, K, D] at the thinking positions.
    """

    z: torch.Tensor
    seen_mask: torch.Tensor
    seen: list
    prefix: list
    thinking: torch.Tensor


class Perceived(NamedTuple):
    """What the task heads see.

    Attributes:
        depth: [S, V, h, w] in metres.
        boxes: [S, N, 7]: centre, size, yaw about z, in metres of the world frame.
        categories: [S, N], and their probabilities [S, N].
        probabilities: see there.
    """

    depth: torch.Tensor
    boxes: torch.Tensor
    categories: torch.Tensor
    probabilities: torch.Tensor


class HiddenCotModel(PreTrainedModel):
    """The student. Scenes come as arrays; see `look`."""

    config_class = HiddenCotConfig

    def __init__(self, config):
        super().__init__(config)
        c, width = config, config.hidden_size
        self.vision_norm = nn.LayerNorm(c.vision_width)
        self.projector = Mlp(c.vision_width, c.projector_width, width)
        self.view_embedding = nn.Parameter(torch.zeros(c.max_views, width))
        if c.camera_width:
            self.camera_norm = nn.LayerNorm(c.camera_width)
            self.camera = nn.Linear(c.camera_width, width)
        self.z_norm = nn.LayerNorm(width)
        self.pool_query = nn.Parameter(torch.zeros(c.vision_prefix, width))
        self.depth_encoder = nn.Linear(c.patch_grid[0] * c.patch_grid[1], width)
        if c.thinking_tokens:
            self.thinking = nn.Parameter(torch.zeros(1, c.thinking_tokens, width))
        self.decoder = Decoder(c)
        self.depth_head = DepthHead(width, c.heads)
        self.detection_head = DetectionHead(width, c.heads)
        # What only training reads: the classifier of patches, eq. 1's features, the spatial head.
        self.none_embedding = nn.Parameter(torch.zeros(1, width))
        self.patch_scale = nn.Parameter(torch.zeros(1))
        if c.heads["teacher_width"]:
            self.feature_head = nn.Linear(width, c.heads["teacher_width"])
        self.spatial_head = SpatialHead(width)
        self.post_init()

    # --- the scene, once for all its questions ---

    def look(self, vision_tokens, view_mask, depth_hint, camera_tokens=None, camera_mask=None):
        """Z, and the keys and values of [V][T].

        Args:
            vision_tokens: [S, V, P, C], `vggt/tokens` of the array contract, patches row-major.
            view_mask: bool [S, V], False = padding view (these stand last).
            depth_hint: [S, V, P] in metres, `vggt/depth` averaged over the known pixels of a patch,
                0 = unknown.
            camera_tokens: [S, V, C], `vggt/camera_tokens`, where the model was trained with them.
            camera_mask: bool [S], scenes that have them; None: all.

        Returns:
            A `Scene`.
        """
        z = self._features(vision_tokens, view_mask, camera_tokens, camera_mask)
        scenes, _, patches = z.shape[:3]
        flat, seen_mask = z.flatten(1, 2), view_mask.repeat_interleave(patches, dim=1)
        columns = self._vision_prefix(flat, seen_mask, view_mask, depth_hint)
        if self.config.thinking_tokens:
            thinking = self.thinking.expand(scenes, -1, -1).to(columns.dtype)
            columns = torch.cat([columns, thinking], dim=1)
        shown = seen_mask.new_ones(columns.shape[:2])
        seen = self.decoder.see(flat)
        hidden, prefix = self.decoder(
            columns, positions_of(shown), causal(shown), None, seen, seen_mask
        )
        return Scene(z, seen_mask, seen, prefix, hidden[:, self.config.vision_prefix :])

    def _features(self, vision_tokens, view_mask, camera_tokens, camera_mask):
        x = vision_tokens.to(self.dtype)
        z = self.projector(self.vision_norm(x)) + self.view_embedding[: x.shape[1], None]
        if self.config.camera_width and camera_tokens is not None:
            camera = self.camera(self.camera_norm(camera_tokens.to(self.dtype)))
            if camera_mask is not None:
                camera = camera * camera_mask[:, None, None]
            z = z + camera[:, :, None]
        return self.z_norm(z) * view_mask[..., None, None]

    def _vision_prefix(self, z, seen_mask, view_mask, depth_hint):
        """V = attention pooling of Z + encoding of the depth map, [S, n_v, D]."""
        query = self.pool_query.expand(len(z), -1, -1)[:, :, None]
        pooled = attend(query, z[:, :, None], z[:, :, None], seen_mask[:, None])[:, :, 0]
        depth = self.depth_encoder(depth_hint.to(self.dtype).log1p()) * view_mask[..., None]
        depth = depth.sum(dim=1) / view_mask.sum(dim=1, keepdim=True).clamp(min=1)
        return pooled + depth[:, None]

    def perceive(self, scene):
        """Depth maps and boxes of a `Scene`."""
        depth = self.depth_head(scene.z, self.config.patch_grid)
        logits, boxes = self.detection_head(scene.z.flatten(1, 2), scene.seen_mask)
        best = logits.sigmoid().max(dim=-1)
        return Perceived(depth, boxes, best.indices, best.values)

    def thinking_tokens(self, scene):
        """Diagnostic mode: the most likely tokens [S, K] at the thinking positions."""
        return self.decoder.lm_head(scene.thinking).argmax(dim=-1)

    # --- the questions ---

    def encode_prompts(self, tokenizer, prompts):
        """S lists of Q texts as `input_ids` and `attention_mask`, see `forward`."""
        ids, mask = encode_prompts(tokenizer, prompts, self.config.bos_token_id)
        return ids.to(self.device), mask.to(self.device)

    def forward(self, scene, input_ids, attention_mask, answer_ids=None):
        """Logits [S, Q, L (+ A), vocabulary] of what follows every token.

        Args:
            scene: of `look`.
            input_ids: [S, Q, L], each question and bos, left-padded.
            attention_mask: bool [S, Q, L], False = padding.
            answer_ids: [S, Q, A], answers behind them, for teacher forcing.
        """
        hidden, _, _ = self._read(scene, input_ids, attention_mask, answer_ids)
        return self.decoder.lm_head(hidden).unflatten(0, input_ids.shape[:2])

    def _read(self, scene, input_ids, attention_mask, answer_ids=None):
        """States [B, L (+ A), D], the past behind them, and which columns of text are shown."""
        questions, length = input_ids.shape[1:]
        ids, shown = input_ids.flatten(0, 1), attention_mask.flatten(0, 1).bool()
        if answer_ids is not None:
            answer = answer_ids.flatten(0, 1)
            ids = torch.cat([ids, answer], dim=1)
            shown = torch.cat([shown, torch.ones_like(answer, dtype=torch.bool)], dim=1)
        columns = scene.prefix[0][0].shape[1]
        # The last column of a prompt is bos: from there on T is seen.
        opened = torch.arange(ids.shape[1], device=ids.device) >= length - 1
        of_prefix = torch.arange(columns, device=ids.device) < self.config.vision_prefix
        of_prefix = (of_prefix | opened[:, None]).expand(len(ids), -1, -1)
        past = [[x.repeat_interleave(questions, dim=0) for x in layer] for layer in scene.prefix]
        hidden, past = self.decoder(
            self.decoder.embed_tokens(ids),
            columns + positions_of(shown),
            torch.cat([of_prefix, causal(shown)], dim=-1),
            past,
            scene.seen,
            scene.seen_mask,
        )
        return hidden, past, shown

    @torch.no_grad()
    def answer(self, scene, input_ids, attention_mask, max_new_tokens=None):
        """Greedy answers [S, Q, A]; from the end token on a row is filled with it.

        Args:
            scene, input_ids, attention_mask: as of `forward`.
            max_new_tokens: at most; None: `answer_length` of the config.
        """
        hidden, past, shown = self._read(scene, input_ids, attention_mask)
        columns = scene.prefix[0][0].shape[1]

        def advance(token):
            nonlocal past, shown
            shown = torch.cat([shown, torch.ones_like(shown[:, :1])], dim=1)
            visible = torch.cat([shown.new_ones(len(shown), columns), shown], dim=1)
            state, past = self.decoder(
                self.decoder.embed_tokens(token[:, None]),
                columns + positions_of(shown)[:, -1:],
                visible[:, None],
                past,
                scene.seen,
                scene.seen_mask,
            )
            return state[:, 0]

        tokens, _ = greedy(
            self.decoder.lm_head,
            advance,
            hidden[:, -1],
            ~shown.any(dim=1),
            self.config.eos_token_id,
            max_new_tokens or self.config.answer_length,
        )
        return tokens.unflatten(0, input_ids.shape[:2])

    def say(self, tokens, tokenizer):
        """Answers of `answer` as S lists of Q texts."""
        end = self.config.eos_token_id
        return [
            [tokenizer.decode(before_end(row, end), skip_special_tokens=True).strip() for row in q]
            for q in tokens
        ]
