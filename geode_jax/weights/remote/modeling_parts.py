"""Parts that both geode_jax models share in PyTorch: attention, question answering, boxes.

Shape letters: S scenes, Q questions of each scene, B = S * Q rows of text, L columns of a row,
A columns of an answer, V views, P patches of a view, D width, H heads of width E, Hk heads of keys
and values, J columns that are attended to.
"""

import math

import torch
from torch import nn
from transformers import PreTrainedModel

MAX_OBJECTS, RELATIONS, BOX_CODE = 5, 6, 8

LOG_EDGES = (math.log(1e-4), 4.0)  # range of the log edge lengths of boxes, edges in metres


def attend(query, key, value, visible):
    """Returns the attention [B, L, H, E] to the visible keys; zero for a query without any.

    Args:
        query: [B, L, H, E].
        key, value: [B, J, Hk, E]; query head h reads key head h * Hk // H.
        visible: bool [B, L or 1, J].
    """
    groups = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(groups, dim=2) for x in (key, value))
    logits = torch.einsum("blhe,bmhe->bhlm", query * query.shape[-1] ** -0.5, key).float()
    weights = logits.masked_fill(~visible[:, None], -torch.inf).softmax(dim=-1).nan_to_num(0.0)
    return torch.einsum("bhlm,bmhe->blhe", weights.to(value.dtype), value)


def rotary_angles(positions, width, theta):
    """Returns cos and sin [B, L, 1, E / 2] of the angles of positions [B, L], in float32."""
    frequency = theta ** -(torch.arange(0, width, 2, device=positions.device) / width)
    angle = positions[..., None, None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x, angles):
    """Applies rotary positions in the rotate-half convention: pairs are (e, e + E / 2)."""
    cos, sin = angles
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width, hidden, out, bias=True):
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, out, bias=bias)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))


class Attention(nn.Module):
    """The four projections of an attention; the caller masks and attends."""

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
    """Computes x + attention of norm(x) to the features of a scene."""

    def __init__(self, width, heads, head_width, bias=True, out_bias=True, eps=1e-5):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads, heads, head_width, bias, out_bias)

    def keys_values(self, context):
        """Returns keys and values of scene features [S, J, D], once for all questions."""
        return self.attention.keys(context), self.attention.values(context)

    def forward(self, x, keys_values, visible):
        """Returns rows of the same shape.

        Args:
            x: [B, L, D], the rows of each scene next to each other.
            keys_values: result of the method of that name.
            visible: bool [S, J].
        """
        scenes = len(keys_values[0])
        query = self.attention.queries(self.norm(x))
        query = query.reshape(scenes, -1, *query.shape[2:])
        key, value = keys_values
        out = attend(query, key, value, visible[:, None])
        return x + self.attention.merge(out.reshape(*x.shape[:2], *out.shape[2:]))


class SpatialHead(nn.Module):
    """Predicts the spatial facts behind a question; read in training alone.

    They are boxes, places, gaps, relations, a bearing and a number.
    """

    def __init__(self, width):
        super().__init__()
        self.objects = nn.Linear(width, BOX_CODE)
        self.places = nn.Linear(width, MAX_OBJECTS * 3)
        self.gaps = nn.Linear(width, MAX_OBJECTS)
        self.relations = nn.Linear(width, RELATIONS)
        self.angle = nn.Linear(width, 2)
        self.value = nn.Linear(width, 1)


def causal(shown):
    """Returns a bool [B, L, L] mask: columns see `shown` ones (bool [B, L]) up to themselves."""
    length = shown.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=shown.device).tril()
    return shown[:, None] & before


def positions_of(shown):
    """Returns positions [B, L] that count the shown columns from 0."""
    return (shown.cumsum(dim=1) - 1).clamp(min=0)


def greedy(head, advance, state, done, eos_id, limit):
    """Decodes greedily until every row has produced the end token.

    Args:
        head: maps states [B, D] to logits.
        advance: maps tokens [B] to the states [B, D] at which they are the input.
        state: [B, D], the state that predicts the first token.
        done: bool [B], True for rows without a question.
        eos_id: the end token, which also fills a row behind its end.
        limit: maximum number of tokens.

    Returns:
        Tokens [B, A] and the states [B, A, D] at which each of them is the input.
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
    """Returns ids [S, Q, L] and their mask for S lists of Q texts: text and bos, left-padded.

    A special token that is spelled out in a text is encoded as text.
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
    """Returns the ids before the first end token, as a list."""
    ids = [int(i) for i in tokens]
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


def decode_boxes(code):
    """Returns boxes [..., 7], metres, of codes [..., 8]: centre, log size, sin and cos of 2 yaw."""
    yaw = 0.5 * torch.atan2(code[..., 6:7], code[..., 7:8])
    return torch.cat([code[..., :3], code[..., 3:6].clamp(*LOG_EDGES).exp(), yaw], dim=-1)


class SceneModel(PreTrainedModel):
    """A model that encodes a scene once and answers any number of questions about it.

    A subclass has `encode_scene`, `answer` and the methods that raise here.
    """

    def encode_prompts(self, tokenizer, prompts):
        """Returns `input_ids` and `attention_mask` of `forward` for S lists of Q texts."""
        ids, mask = encode_prompts(tokenizer, prompts, self.config.bos_token_id)
        return ids.to(self.device), mask.to(self.device)

    def forward(self, scene, input_ids, attention_mask, answer_ids=None):
        """Returns logits [S, Q, L (+ A), vocabulary] of the token that follows each token.

        Args:
            scene: result of `encode_scene`.
            input_ids: [S, Q, L], each question and bos, left-padded.
            attention_mask: bool [S, Q, L], False = padding.
            answer_ids: [S, Q, A], answers that follow the questions, for teacher forcing.
        """
        states, *_ = self._read(scene, input_ids, attention_mask, answer_ids)
        return self._logits(states).unflatten(0, input_ids.shape[:2])

    def _embed(self, ids):
        """Returns the embeddings [B, L, D] of ids [B, L]."""
        raise NotImplementedError

    def _logits(self, states):
        """Returns the logits of states [..., D]."""
        raise NotImplementedError

    def _prefix(self, scene, questions):
        """Returns the keys and values in front of the text, and which columns count.

        Both are repeated for `questions` rows of each scene; the mask is bool [B, P].
        """
        raise NotImplementedError

    def _run(self, x, positions, visible, cache, scene):
        """Returns states [B, L, D] of embeddings x behind the cache, and the longer cache.

        Args:
            x: [B, L, D].
            positions: [B, L].
            visible: bool [B, L, columns of the cache + L].
            cache: keys and values of the columns in front.
            scene: result of `encode_scene`.
        """
        raise NotImplementedError

    def _visible_prefix(self, before, length, prompt):
        """Returns a bool [B, length, P] mask of the prefix columns that each column sees.

        Args:
            before: bool [B, P], the prefix columns that count.
            length: columns of text.
            prompt: how many of them belong to the prompt, whose last one is bos.
        """
        return before[:, None].expand(-1, length, -1)

    def _read(self, scene, input_ids, attention_mask, answer_ids=None):
        """Returns states [B, L (+ A), D], the cache, and the masks of prefix and text columns."""
        ids, shown = input_ids.flatten(0, 1), attention_mask.flatten(0, 1).bool()
        if answer_ids is not None:
            answer = answer_ids.flatten(0, 1)
            ids = torch.cat([ids, answer], dim=1)
            shown = torch.cat([shown, torch.ones_like(answer, dtype=torch.bool)], dim=1)
        cache, before = self._prefix(scene, input_ids.shape[1])
        in_prefix = self._visible_prefix(before, ids.shape[1], input_ids.shape[2])
        visible = torch.cat([in_prefix, causal(shown)], dim=-1)
        positions = before.sum(dim=1, keepdim=True) + positions_of(shown)
        states, cache = self._run(self._embed(ids), positions, visible, cache, scene)
        return states, cache, before, shown

    def _generate(self, scene, input_ids, attention_mask, max_new_tokens):
        """Returns greedy tokens [S, Q, A] and the states [S, Q, A, D] at which they are input."""
        states, cache, before, shown = self._read(scene, input_ids, attention_mask)
        done = ~shown.any(dim=1)

        def advance(token):
            nonlocal cache, shown
            shown = torch.cat([shown, torch.ones_like(shown[:, :1])], dim=1)
            visible = torch.cat([before, shown], dim=1)[:, None]
            positions = before.sum(dim=1, keepdim=True) + positions_of(shown)[:, -1:]
            state, cache = self._run(self._embed(token[:, None]), positions, visible, cache, scene)
            return state[:, 0]

        limit = max_new_tokens or self.config.answer_length
        found = greedy(self._logits, advance, states[:, -1], done, self.config.eos_token_id, limit)
        return tuple(x.unflatten(0, input_ids.shape[:2]) for x in found)
