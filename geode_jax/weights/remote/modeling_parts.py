"""What both models of geode_jax are made of in PyTorch: attention, greedy decoding, boxes.

Letters of shapes: S scenes, Q questions of each, B = S * Q rows of text, L columns, V views,
P patches of a view, D width, H heads of width E, G of them with keys of their own.
"""

import math

import torch
from torch import nn

MAX_OBJECTS, RELATIONS, BOX_CODE = 5, 6, 8

LOG_EDGES = (math.log(1e-4), 4.0)  # of boxes, in metres


def attend(query, key, value, visible):
    """Attention [B, L, H, E] to the visible keys; a query that sees none gets zero.

    Args:
        query: [B, L, H, E].
        key, value: [B, M, G, E]; head h reads key head h * G // H.
        visible: bool [B, L or 1, M].
    """
    groups = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(groups, dim=2) for x in (key, value))
    logits = torch.einsum("blhe,bmhe->bhlm", query * query.shape[-1] ** -0.5, key).float()
    weights = logits.masked_fill(~visible[:, None], -torch.inf).softmax(dim=-1).nan_to_num(0.0)
    return torch.einsum("bhlm,bmhe->blhe", weights.to(value.dtype), value)


def rotary_angles(positions, width, theta):
    """cos and sin [B, L, 1, E / 2] of positions [B, L], in float32."""
    frequency = theta ** -(torch.arange(0, width, 2, device=positions.device) / width)
    angle = positions[..., None, None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x, angles):
    """Rotary positions in the rotate-half convention: pairs are (e, e + E / 2)."""
    cos, sin = angles
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Mlp(nn.Module):
    """Linear, GELU (exact), linear."""

    def __init__(self, width, hidden, out, bias=True):
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, out, bias=bias)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))


class Attention(nn.Module):
    """Projections of an attention; who sees what is the caller's."""

    def __init__(self, width, heads, kv_heads, head_width, bias=True, out_bias=True):
        super().__init__()
        self.head_width = head_width
        self.q_proj = nn.Linear(width, heads * head_width, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * head_width, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * head_width, bias=bias)
        self.o_proj = nn.Linear(heads * head_width, width, bias=out_bias)

    def queries(self, x):
        return self._heads(self.q_proj(x))

    def keys(self, x):
        return self._heads(self.k_proj(x))

    def values(self, x):
        return self._heads(self.v_proj(x))

    def merge(self, x):
        return self.o_proj(x.flatten(-2))

    def _heads(self, x):
        return x.unflatten(-1, (-1, self.head_width))


class CrossAttention(nn.Module):
    """x + attention of norm(x) to what a scene shows."""

    def __init__(self, width, heads, head_width, bias=True, out_bias=True, eps=1e-5):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads, heads, head_width, bias, out_bias)

    def see(self, context):
        """Keys and values of a scene's features [S, M, D]; once for all its questions."""
        return self.attention.keys(context), self.attention.values(context)

    def forward(self, x, seen, visible):
        """Rows [B, L, D] in scene order; `visible` bool [S, M]."""
        scenes = len(seen[0])
        query = self.attention.queries(self.norm(x))
        query = query.reshape(scenes, -1, *query.shape[2:])
        out = attend(query, *seen, visible[:, None])
        return x + self.attention.merge(out.reshape(*x.shape[:2], *out.shape[2:]))


class SpatialHead(nn.Module):
    """What a question is about, in space: boxes, places, gaps, relations, a bearing, a number."""

    def __init__(self, width):
        super().__init__()
        self.objects = nn.Linear(width, BOX_CODE)
        self.places = nn.Linear(width, MAX_OBJECTS * 3)
        self.gaps = nn.Linear(width, MAX_OBJECTS)
        self.relations = nn.Linear(width, RELATIONS)
        self.angle = nn.Linear(width, 2)
        self.value = nn.Linear(width, 1)


def causal(shown):
    """bool [B, L, L]: every column sees those up to itself that are `shown` (bool [B, L])."""
    length = shown.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=shown.device).tril()
    return shown[:, None] & before


def positions_of(shown):
    """Positions [B, L] that count the shown columns from 0."""
    return (shown.cumsum(dim=1) - 1).clamp(min=0)


def greedy(head, advance, state, done, eos_id, limit):
    """The most likely tokens, one after the other, until every row has said the end.

    Args:
        head: states [B, D] -> logits.
        advance: tokens [B] -> the state [B, D] where they are the input.
        state: where the first token is predicted.
        done: bool [B], rows that say nothing.
        eos_id: fills a row from its end on.
        limit: at most so many tokens.

    Returns:
        Tokens [B, A] and the states [B, A, D] where each of them is the input.
    """
    tokens, states = [], []
    for _ in range(limit):
        token = torch.where(done, eos_id, head(state).argmax(dim=-1))
        state = advance(token)
        tokens.append(token)
        states.append(state)
        done = done | (token == eos_id)
        if done.all():
            break
    return torch.stack(tokens, dim=1), torch.stack(states, dim=1)


def encode_prompts(tokenizer, prompts, bos_id):
    """Ids [S, Q, L] and their mask of S lists of Q texts: each text and bos, left-padded.

    A special token that stands in a text is read as text.
    """
    rows = [
        tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] + [bos_id]
        for texts in prompts
        for text in texts
    ]
    length = max(map(len, rows))
    ids = torch.tensor([[bos_id] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    shape = (len(prompts), -1, length)
    return ids.reshape(shape), mask.reshape(shape)


def before_end(tokens, eos_id):
    """The ids before the first end token."""
    ids = [int(i) for i in tokens]
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


def decode_boxes(code):
    """Codes [..., 8] (centre, log size, sin and cos of 2 yaw) to boxes [..., 7], metres."""
    yaw = 0.5 * torch.atan2(code[..., 6:7], code[..., 7:8])
    return torch.cat([code[..., :3], code[..., 3:6].clamp(*LOG_EDGES).exp(), yaw], dim=-1)
