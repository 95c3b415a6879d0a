"""The Hidden-CoT student (paper Sec. III-C): `[V][T1..TK][Q][A]` over VGGT features.

The parts of the sequence have the paper's symbols V, T, Q and A (as axes, letters are those of
`geode_jax.shapes`). The vision features z, V and T are computed once per scene and shared by all
its questions:

    vision tokens --MLP--> z ---------------------------> depth, detection, feature heads
                           |-- pooling + depth map --> V
    [V][T] --trunk (cross-attends to z)--> keys and values of the prefix
    [Q]    --trunk (sees V, cross-attends to z)----------> spatial head
    [bos][A] --trunk (sees V, T, Q, cross-attends to z)--> answer logits

The paper trains T from the answer loss alone, so auxiliary heads must not read states that saw T.
Therefore the causal mask has one restriction: T is visible from bos on, which starts the answer,
but not to the question. So the answer reads the same question states that the heads train.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Float32

from geode_jax import ranges
from geode_jax.errors import UserError
from geode_jax.models.decoder import Decoder, DecoderConfig, KeyValues
from geode_jax.models.layers import LayerNorm, Mlp, Projection, param
from geode_jax.models.packed import pick, read_packed
from geode_jax.models.task_heads import (
    DepthHead,
    DetectionHead,
    DetectionOutput,
    HeadsConfig,
    SpatialHead,
    SpatialOutput,
)
from geode_jax.ops.attention import Intervals, attention
from geode_jax.shapes import Array, Batch


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """Sizes of the student.

    Attributes:
        decoder: the trunk.
        heads: the task heads.
        vision_width: C of the vision tokens (2048 for VGGT-1B).
        camera_width: C of the camera tokens; 0: no camera tokens.
        patch_grid: (gh, gw) patches of a view, P = gh * gw.
        max_views: size of the view embedding.
        projector_width: inner width of the projector.
        thinking_tokens: K; 0: the baseline without Hidden CoT.
        vision_prefix: length of V in tokens, 1 in the paper.
        question_sees_thinking: whether the question attends to T, as in a causal `[V][T][Q][A]`;
            else only the answer does.
        category_ids: token ids of every category's noun, whose embeddings are the weights of the
            patch classifier.
    """

    decoder: DecoderConfig
    heads: HeadsConfig
    vision_width: int
    patch_grid: tuple[int, int]
    max_views: int
    projector_width: int
    camera_width: int = 0
    thinking_tokens: int = 8
    vision_prefix: int = 1
    question_sees_thinking: bool = False
    category_ids: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        sizes = {"vision_width max_views projector_width vision_prefix": ranges.whole(1)}
        ranges.check(self, {**sizes, "camera_width thinking_tokens": ranges.whole(0)})
        if len(self.patch_grid) != 2 or min(self.patch_grid) < 1:
            raise UserError(f"StudentConfig: patch_grid: {self.patch_grid} is not (gh, gw)")

    @property
    def prefix_length(self) -> int:
        """Number of columns of `[V][T]`."""
        return self.vision_prefix + self.thinking_tokens

    @property
    def prompt_prefix(self) -> int:
        """Number of columns of `[V][T]` that the question sees."""
        return self.prefix_length if self.question_sees_thinking else self.vision_prefix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scene:
    """What the questions of a scene share, for S scenes."""

    z_SVPD: Array
    seen_length_S: Array  # valid vision tokens, int32; 0 = vision removed
    seen: list[KeyValues | None]  # keys and values of z for cross-attention
    prefix: list[KeyValues]  # keys and values of [V][T]
    thinking_SKD: Array  # hidden states at the thinking positions, for the diagnostic mode


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StudentOutput:
    """The inputs of the losses of Sec. III-D."""

    answer_hidden_SQAD: Array  # states that predict the answers' tokens
    depth_logits_SVhwZ: Array
    patch_logits_SVPc: Array  # category of the patch; the last class is "none of them"
    detection: DetectionOutput
    features_SVPF: Array | None  # the student's spatial features F_s of eq. 1
    spatial: SpatialOutput


class Student(nnx.Module):
    """The Hidden-CoT student; see the file's docstring."""

    def __init__(self, config: StudentConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        D = c.decoder.width
        self.vision_norm = LayerNorm(c.vision_width)
        self.projector = Mlp(c.vision_width, c.projector_width, D, rngs=rngs)
        self.view_embedding = param(
            0.02 * jax.random.normal(rngs.params(), (c.max_views, D)), None, "embed"
        )
        if c.camera_width:
            self.camera_norm = LayerNorm(c.camera_width)
            self.camera = Projection((c.camera_width,), (D,), (None, "embed"), bias=True, rngs=rngs)
        self.z_norm = LayerNorm(D)
        self.pool_query = param(
            jax.random.normal(rngs.params(), (c.vision_prefix, D)), None, "embed"
        )
        patches = c.patch_grid[0] * c.patch_grid[1]
        self.depth_encoder = Projection((patches,), (D,), (None, "embed"), bias=True, rngs=rngs)
        thinking = 0.02 * jax.random.normal(rngs.params(), (1, c.thinking_tokens, D))
        # Checkpoints cannot hold a parameter of size 0.
        self.thinking = param(thinking, None, None, "embed") if c.thinking_tokens else None
        self.decoder = Decoder(c.decoder, rngs=rngs)
        self.depth_head = DepthHead(D, c.heads, rngs=rngs)
        self.detection_head = DetectionHead(D, c.heads, rngs=rngs)
        self.none_embedding = param(jax.random.normal(rngs.params(), (1, D)), None, "embed")
        self.patch_scale = param(jnp.zeros(()))
        self.feature_head = (
            Projection((D,), (c.heads.teacher_width,), ("embed", None), bias=True, rngs=rngs)
            if c.heads.teacher_width
            else None
        )
        self.spatial_head = SpatialHead(D, rngs=rngs)

    # --- the scene, once for all its questions ---

    def encode_scene(self, batch: Batch) -> Scene:
        """Returns z, and the keys and values of `[V][T]`, for the S scenes of a batch."""
        z_SVPD, seen_length_S = self._project(batch)
        S, V, P, D = z_SVPD.shape
        z_SMD = z_SVPD.reshape(S, V * P, D)
        seen = self.decoder.cross_keys(z_SMD)
        columns = self._vision_prefix(batch, z_SMD, seen_length_S)
        if self.thinking is not None:
            thinking = self.thinking[...].astype(columns.dtype)
            thinking = jnp.broadcast_to(thinking, (S, *thinking.shape[1:]))
            columns = jnp.concatenate([columns, thinking], axis=1)
        hidden, prefix = self.decoder.run_prefix(columns, seen, seen_length_S)
        return Scene(
            z_SVPD=z_SVPD,
            seen_length_S=seen_length_S,
            seen=seen,
            prefix=prefix,
            thinking_SKD=hidden[:, self.config.vision_prefix :],
        )

    def _project(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns z [S, V, P, D] and the number of its valid tokens [S].

        z = norm(MLP(norm(tokens)) + view embedding + camera token), zero at padding views.
        """
        with jax.named_scope("projector"):
            x = jnp.asarray(batch.vision_SVPC).astype(self.config.decoder.dtype)
            V, P = x.shape[1:3]
            view = self.view_embedding[...][:V, None].astype(x.dtype)
            z = self.projector(self.vision_norm(x)) + view
            if self.config.camera_width:
                camera = jnp.asarray(batch.camera_SVC).astype(x.dtype)
                camera = self.camera(self.camera_norm(camera))
                known = jnp.asarray(batch.camera_mask_S)[:, None, None]
                z = z + jnp.where(known, camera, 0)[:, :, None]
            z = self.z_norm(z)
            mask = jnp.asarray(batch.view_mask_SV)
            # Padding views come last, so the valid tokens are one interval.
            return z * mask[..., None, None], jnp.sum(mask, axis=1).astype(jnp.int32) * P

    def _vision_prefix(self, batch: Batch, z_SMD: Array, seen_length_S: Array) -> jax.Array:
        """Returns the prefix [S, vision_prefix, D]: attention pooling of z + encoded depth map."""
        S = z_SMD.shape[0]
        query = self.pool_query[...].astype(z_SMD.dtype)
        query = jnp.broadcast_to(query, (S, *query.shape))[:, :, None]
        end = jnp.broadcast_to(seen_length_S[:, None], query.shape[:2])
        zero = jnp.zeros_like(end)
        z_SM1D = z_SMD[:, :, None]
        pooled = attention(query, z_SM1D, z_SM1D, Intervals(zero, zero, end))[:, :, 0]
        mask_SV1 = jnp.asarray(batch.view_mask_SV)[..., None]
        depth_SVD = self.depth_encoder(jnp.log1p(jnp.asarray(batch.depth_hint_SVP)))
        views = jnp.maximum(jnp.sum(mask_SV1, axis=1), 1)
        depth_SD = jnp.sum(jnp.where(mask_SV1, depth_SVD, 0), axis=1) / views
        return pooled + depth_SD[:, None].astype(pooled.dtype)

    def thinking_logits(self, scene: Scene) -> Float32[jax.Array, "S K X"]:
        """Returns the logits at the thinking positions (diagnostic mode, Sec. V-d)."""
        return self.decoder.logits(scene.thinking_SKD)

    # --- the questions ---

    def read(
        self, scene: Scene, batch: Batch
    ) -> tuple[Float[jax.Array, "S Q A D"], Float[jax.Array, "S Q D"], Float[jax.Array, "S Q O D"]]:
        """Runs all packed questions of the scenes with their answers (teacher forcing).

        Returns:
            Hidden states that predict the answer tokens; each question's encoding, its last state;
            and the states at the names of its objects. The question's states have seen T only if
            the config says so.
        """
        columns = self.config.prefix_length
        hidden = read_packed(
            self.decoder,
            batch,
            scene.prefix,
            jnp.full(len(scene.seen_length_S), columns, jnp.int32),
            jnp.where(batch.packed_answer_SWT, columns, self.config.prompt_prefix),
            seen=scene.seen,
            seen_length_S=scene.seen_length_S,
        )
        return (
            pick(hidden, batch.answer_column_SQA),
            pick(hidden, batch.encoding_column_SQ),
            pick(hidden, batch.object_column_SQO),
        )

    def patch_logits(
        self, z_SVPD: Float[Array, "S V P D"]
    ) -> Float32[jax.Array, "S V P {len(self.config.category_ids)+1}"]:
        """Returns category logits of patches; the last class is "none".

        The weights are the embeddings of the categories' nouns. This puts a patch and its noun into
        one space, so that a question's noun finds its patches by cross-attention.
        """
        nouns = jnp.stack(
            [
                jnp.mean(self.decoder.embedding[...][jnp.asarray(ids)], axis=0)
                for ids in self.config.category_ids
            ]
        )
        classes = jnp.concatenate([nouns, self.none_embedding[...]])
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(classes), axis=-1, keepdims=True) + 1e-6)
        classes = (classes * scale).astype(z_SVPD.dtype)
        logits = jnp.einsum("svpd,cd->svpc", z_SVPD, classes).astype(jnp.float32)
        return logits * (jnp.exp(self.patch_scale[...]) * z_SVPD.shape[-1] ** -0.5)

    def __call__(self, batch: Batch) -> StudentOutput:
        """Returns all outputs that training needs."""
        scene = self.encode_scene(batch)
        S, V, P, D = scene.z_SVPD.shape
        answer_hidden, encoding, names = self.read(scene, batch)
        with jax.named_scope("heads"):
            features = None if self.feature_head is None else self.feature_head(scene.z_SVPD)
            return StudentOutput(
                answer_hidden_SQAD=answer_hidden,
                depth_logits_SVhwZ=self.depth_head(scene.z_SVPD, self.config.patch_grid).astype(
                    jnp.float32
                ),
                patch_logits_SVPc=self.patch_logits(scene.z_SVPD),
                detection=self.detection_head(
                    scene.z_SVPD.reshape(S, V * P, D), scene.seen_length_S
                ),
                features_SVPF=features,
                spatial=self.spatial_head(encoding, names),
            )
