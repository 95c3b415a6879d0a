"""The Hidden-CoT student in PyTorch: [V][T1..TK][question][bos][answer] over VGGT features.

A scene's vision tokens become features Z, one token V, and K learned thinking tokens T that are
never decoded. The answer, which bos opens, sees T; the question does not. `modeling_parts` has the
shape letters; here also C channels of a vision token, N object queries, J = V * P patches.
"""

import math
from typing import NamedTuple, cast

import torch
from torch import nn
from transformers import PretrainedConfig

from .modeling_parts import (
    BOX_CODE,
    Attention,
    CrossAttention,
    Mlp,
    SceneModel,
    SpatialHead,
    attend,
    before_end,
    causal,
    decode_boxes,
    positions_of,
    rotary_angles,
    rotate,
)

NEAREST_DEPTH, FARTHEST_DEPTH = 0.3, 10.0  # metres; centres of the outer depth bins
HEAD_SIZES = {
    "width": 128,
    "depth_bins": 64,
    "depth_cells": 2,
    "queries": 64,
    "detection_layers": 2,
    "categories": 20,
    "teacher_width": 1024,
}


class HiddenCotConfig(PretrainedConfig):
    """Sizes of the student; the defaults are those of `configs/hidden_cot.py:full`.

    Args:
        vision_width, camera_width: widths of VGGT's tokens; 0 = no camera tokens.
        patch_grid: (rows, columns) of patches of a view.
        max_views: size of the view embedding.
        thinking_tokens: K.
        vision_prefix: number of V tokens.
        question_sees_thinking: whether the question attends to the thinking tokens.
        cross_attention_layers: layers that begin with cross-attention to Z.
        heads: sizes of the depth, detection and feature heads.
        category_ids: token ids of every category's noun; () = not known.
        answer_length: maximum number of tokens of an answer.
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
        cross_attention_layers=(8, 16),
        vision_width=2048,
        camera_width=2048,
        patch_grid=(37, 37),
        max_views=8,
        projector_width=1024,
        thinking_tokens=8,
        vision_prefix=1,
        question_sees_thinking=True,
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
        self.question_sees_thinking = question_sees_thinking
        self.heads = dict(heads or HEAD_SIZES)
        self.category_ids = category_ids
        self.answer_length = answer_length
        super().__init__(**kwargs)


class DecoderLayer(nn.Module):
    """Cross-attention to Z (in some layers), causal self-attention, feed-forward; all pre-norm."""

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

    def forward(self, x, angles, visible, past, cross, patch_mask):
        if self.cross_attn is not None:
            x = self.cross_attn(x, cross, patch_mask)
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
    """The language model: embedding, layers, final norm and output matrix."""

    def __init__(self, c):
        super().__init__()
        self.head_width, self.theta = c.head_dim, c.rope_theta
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(c, i in c.cross_attention_layers) for i in range(c.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def cross_keys_values(self, z):
        """Returns, for each layer, keys and values of Z [S, J, D]; None: no cross-attention."""
        # The cast is needed because ModuleList is not generic.
        attentions = [layer.cross_attn for layer in cast("list[DecoderLayer]", self.layers)]
        return [None if cross is None else cross.keys_values(z) for cross in attentions]

    def forward(self, x, positions, visible, past, cross, patch_mask):
        """Returns normed states [B, L, D] and the past with the new columns appended.

        Args:
            x: embeddings [B, L, D].
            positions: [B, L].
            visible: bool [B, L, columns of the past + L].
            past: (keys, values) of each layer for the columns in front; None: there are none.
            cross: result of `cross_keys_values`.
            patch_mask: bool [S, J].
        """
        angles = rotary_angles(positions, self.head_width, self.theta)
        grown = []
        for i, layer in enumerate(self.layers):
            x, keys_values = layer(
                x, angles, visible, None if past is None else past[i], cross[i], patch_mask
            )
            grown.append(keys_values)
        return self.norm(x), grown


class DepthHead(nn.Module):
    """Predicts bins of log depth for the r x r cells of every patch."""

    def __init__(self, width, heads):
        super().__init__()
        self.cells, self.bins = heads["depth_cells"], heads["depth_bins"]
        self.mlp = Mlp(width, heads["width"], self.cells**2 * self.bins)

    def forward(self, z, grid):
        """Returns the expected depth [S, V, h, w] of Z [S, V, P, D], metres; (h, w) = r * grid."""
        r = self.cells
        x = self.mlp(z).unflatten(-1, (r, r, self.bins)).unflatten(2, tuple(grid))
        x = x.permute(0, 1, 2, 4, 3, 5, 6).flatten(4, 5).flatten(2, 3)
        # The mean is taken in log depth, in which the bins are evenly spaced.
        near, far = math.log(NEAREST_DEPTH), math.log(FARTHEST_DEPTH)
        centres = torch.linspace(near, far, self.bins, device=x.device)
        return (x.float().softmax(dim=-1) * centres).sum(dim=-1).exp()


class QueryLayer(nn.Module):
    """Object queries attend to Z (`look`), then to each other (`talk`), then pass an MLP."""

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
    """Predicts a set of oriented boxes from learned object queries."""

    def __init__(self, width, heads):
        super().__init__()
        w = heads["width"]
        self.reduce = nn.Linear(width, w)
        self.places = nn.Parameter(torch.zeros(heads["queries"], w))
        self.layers = nn.ModuleList(QueryLayer(w, 4) for _ in range(heads["detection_layers"]))
        self.norm = nn.LayerNorm(w)
        self.classes = nn.Linear(w, heads["categories"])
        self.boxes = Mlp(w, w, BOX_CODE)

    def forward(self, z, patch_mask):
        """Returns class logits [S, N, categories] and boxes [S, N, 7] of features Z [S, J, D]."""
        z, visible = self.reduce(z), patch_mask[:, None]
        x = z.new_zeros(len(z), *self.places.shape)
        for layer in self.layers:
            x = layer(x, self.places, z, visible)
        x = self.norm(x)
        return self.classes(x).float(), decode_boxes(self.boxes(x).float())


class Scene(NamedTuple):
    """S encoded scenes, as all of their questions share them.

    Attributes:
        z: features [S, V, P, D], 0 at padding views.
        patch_mask: bool [S, J], False = patch of a padding view.
        cross: keys and values of Z for each layer; None: no cross-attention.
        prefix: keys and values of [V][T] for each layer.
        thinking: states [S, K, D] at the thinking positions.
    """

    z: torch.Tensor
    patch_mask: torch.Tensor
    cross: list
    prefix: list
    thinking: torch.Tensor


class ScenePrediction(NamedTuple):
    """Output of the task heads.

    Attributes:
        depth: [S, V, h, w] in metres.
        boxes: [S, N, 7]: centre, size, yaw about z, in metres of the world frame.
        categories: [S, N], the most likely category of each box.
        probabilities: [S, N], of that category.
    """

    depth: torch.Tensor
    boxes: torch.Tensor
    categories: torch.Tensor
    probabilities: torch.Tensor


class HiddenCotModel(SceneModel):
    """The student; `encode_scene` lists the arrays that it takes."""

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
        # Read in training alone: the classifier of patches, eq. 1's features, the spatial head.
        self.none_embedding = nn.Parameter(torch.zeros(1, width))
        self.patch_scale = nn.Parameter(torch.zeros(1))
        if c.heads["teacher_width"]:
            self.feature_head = nn.Linear(width, c.heads["teacher_width"])
        self.spatial_head = SpatialHead(width)
        self.post_init()

    # --- the scene, once for all its questions ---

    def encode_scene(
        self, vision_tokens, view_mask, depth_hint, camera_tokens=None, camera_mask=None
    ):
        """Returns a `Scene`: Z, and the keys and values of [V][T].

        Args:
            vision_tokens: [S, V, P, C], `vggt/tokens` of the array contract, patches row-major.
            view_mask: bool [S, V], False = padding view (padding comes last).
            depth_hint: [S, V, P] in metres, `vggt/depth` averaged over the known pixels of a patch,
                0 = unknown.
            camera_tokens: [S, V, C], `vggt/camera_tokens`, if the model was trained with them.
            camera_mask: bool [S], True for scenes with camera tokens; None: all of them.
        """
        z = self._features(vision_tokens, view_mask, camera_tokens, camera_mask)
        scenes, _, patches = z.shape[:3]
        flat, patch_mask = z.flatten(1, 2), view_mask.repeat_interleave(patches, dim=1)
        columns = self._vision_prefix(flat, patch_mask, view_mask, depth_hint)
        if self.config.thinking_tokens:
            thinking = self.thinking.expand(scenes, -1, -1).to(columns.dtype)
            columns = torch.cat([columns, thinking], dim=1)
        shown = patch_mask.new_ones(columns.shape[:2])
        cross = self.decoder.cross_keys_values(flat)
        hidden, prefix = self.decoder(
            columns, positions_of(shown), causal(shown), None, cross, patch_mask
        )
        return Scene(z, patch_mask, cross, prefix, hidden[:, self.config.vision_prefix :])

    def _features(self, vision_tokens, view_mask, camera_tokens, camera_mask):
        x = vision_tokens.to(self.dtype)
        z = self.projector(self.vision_norm(x)) + self.view_embedding[: x.shape[1], None]
        if self.config.camera_width and camera_tokens is not None:
            camera = self.camera(self.camera_norm(camera_tokens.to(self.dtype)))
            if camera_mask is not None:
                camera = camera * camera_mask[:, None, None]
            z = z + camera[:, :, None]
        return self.z_norm(z) * view_mask[..., None, None]

    def _vision_prefix(self, z, patch_mask, view_mask, depth_hint):
        """Returns V = attention pooling of Z + encoding of the depth map, [S, vision_prefix, D]."""
        query = self.pool_query.expand(len(z), -1, -1)[:, :, None]
        pooled = attend(query, z[:, :, None], z[:, :, None], patch_mask[:, None])[:, :, 0]
        depth = self.depth_encoder(depth_hint.to(self.dtype).log1p()) * view_mask[..., None]
        depth = depth.sum(dim=1) / view_mask.sum(dim=1, keepdim=True).clamp(min=1)
        return pooled + depth[:, None]

    def predict_geometry(self, scene):
        """Returns a `ScenePrediction`: depth maps and boxes of a `Scene`."""
        depth = self.depth_head(scene.z, self.config.patch_grid)
        logits, boxes = self.detection_head(scene.z.flatten(1, 2), scene.patch_mask)
        best = logits.sigmoid().max(dim=-1)
        return ScenePrediction(depth, boxes, best.indices, best.values)

    def thinking_tokens(self, scene):
        """Returns the most likely tokens [S, K] at the thinking positions, as a diagnostic."""
        return self.decoder.lm_head(scene.thinking).argmax(dim=-1)

    # --- the questions ---

    def _embed(self, ids):
        return self.decoder.embed_tokens(ids)

    def _logits(self, states):
        return self.decoder.lm_head(states)

    def _prefix(self, scene, questions):
        past = [[x.repeat_interleave(questions, dim=0) for x in layer] for layer in scene.prefix]
        return past, scene.patch_mask.new_ones(past[0][0].shape[:2])

    def _run(self, x, positions, visible, cache, scene):
        return self.decoder(x, positions, visible, cache, scene.cross, scene.patch_mask)

    def _visible_prefix(self, before, length, prompt):
        # V is seen everywhere, T from bos on, which is the last column of a prompt, or everywhere.
        if self.config.question_sees_thinking:
            return before[:, None].expand(-1, length, -1)
        from_bos = torch.arange(length, device=before.device) >= prompt - 1
        in_v = torch.arange(before.shape[1], device=before.device) < self.config.vision_prefix
        return before[:, None] & (in_v | from_bos[:, None])

    @torch.no_grad()
    def answer(self, scene, input_ids, attention_mask, max_new_tokens=None):
        """Returns greedy answers [S, Q, A]; the end token also fills a row behind its end.

        Args:
            scene, input_ids, attention_mask: as in `forward`.
            max_new_tokens: maximum length of an answer; None: `answer_length` of the config.
        """
        return self._generate(scene, input_ids, attention_mask, max_new_tokens)[0]

    def decode_answers(self, tokens, tokenizer):
        """Returns the result of `answer` as S lists of Q texts."""
        end = self.config.eos_token_id
        return [
            [tokenizer.decode(before_end(row, end), skip_special_tokens=True).strip() for row in q]
            for q in tokens
        ]
