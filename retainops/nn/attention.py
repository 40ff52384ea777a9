"""MultiheadAttention: a module of attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from retainops.nn.point import HoldsPoints, gradients_reach, note_grad_mode, parts_for
from retainops.ops.attention import ATTENTION, attention, attention_of
from retainops.retained import Retained

Tensor = torch.Tensor


def attend(inputs: tuple[Any, ...], requests: tuple[Retained, ...]) -> Tensor:
    """Attention of these inputs, all of them as its reference takes them, for each of these requests.

    Without grad nothing is kept, and no error.
    """
    note_grad_mode(requests)
    if requests and gradients_reach(*inputs):
        return attention_of(inputs, requests)
    return attention(*inputs[:8], **dict(zip(("softcap", "window"), inputs[8:], strict=False)))


class MultiheadAttention(nn.MultiheadAttention, HoldsPoints):
    """`torch.nn.MultiheadAttention`, whose scores and probabilities can be asked for: points s, p and o.

    It is a subclass of PyTorch's module, with its arguments, shapes, results, gradients and state dict; while nothing
    is asked, it runs that module's code. So it stands in for one: `layer.self_attn = ro.nn.MultiheadAttention(...)`.

    Call it with need_weights=False, as `torch.nn.TransformerEncoderLayer` does. Weights are the probabilities in
    memory, (batch, heads, queries, keys), and with them points are kept by PyTorch's operations, whatever their form.

    Points:
        s, p, (batch, heads, queries, keys), and o, (batch, heads, queries, embed_dim / heads): those of
        `ro.attention`, before the output projection. p is before dropout; the weights that are returned are after it.
        add_bias_kv and add_zero_attn are one key more, each.

    Raises:
        ValueError, AssertionError, RuntimeError: as of `torch.nn.MultiheadAttention`.

    Example:
        >>> layer = nn.TransformerEncoderLayer(64, 4, batch_first=True)
        >>> mine = ro.nn.MultiheadAttention(64, 4, batch_first=True)
        >>> mine.load_state_dict(layer.self_attn.state_dict())
        >>> layer.self_attn = mine
        >>> with ro.retain(layer, "self_attn.p", ro.Relevance("chefer")) as kept:
        ...     layer(x).sum().backward()
        >>> kept["self_attn.p"].chefer  # (batch, N, N)
    """

    op = ATTENTION

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        requests = parts_for(self._requests, ATTENTION.points)
        note_grad_mode(requests)
        masks = [t for t in (key_padding_mask, attn_mask) if t is not None]
        if not requests or not gradients_reach(query, key, value, *masks, *self.parameters()):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = query.dim() == 3
        self._check(query, key, value, key_padding_mask)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "MultiheadAttention: is_causal is True and attn_mask None; is_causal says of attn_mask that it is the "
                "causal mask: pass that, as torch.nn.Transformer.generate_square_subsequent_mask(N)"
            )
        padding, mask = self._additive(key_padding_mask, attn_mask, query.dtype)
        padding = padding if batched or padding is None else padding.unsqueeze(0)
        q = self._length_first(query, batched)
        # What is one tensor stays one: its projections are one product. PyTorch's module does so for batches alone.
        k = q if key is query and batched else self._length_first(key, batched)
        v = k if value is key and batched else self._length_first(value, batched)
        q, k, v = self._heads(*self._projected(q, k, v))
        if is_causal and padding is None and not need_weights:
            mask = None
        else:
            is_causal = False
            mask = self._joined(mask, padding, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            o, weights = self._with_weights(q, k, v, mask, dropout)
        else:
            o = attend((q, k, v, mask, dropout, is_causal, None, False, None, None), requests)
        n, _, length, _ = o.shape
        rows = o.permute(2, 0, 1, 3).reshape(length * n, self.embed_dim)
        out = F.linear(rows, self.out_proj.weight, self.out_proj.bias)  # PyTorch's module does not call it either
        out = out.view(length, n, self.embed_dim)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(1), None if weights is None else weights.squeeze(0)
        return out.transpose(0, 1) if self.batch_first else out, weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> None:
        """What PyTorch's module checks, and with its class of error."""
        tokens = (query, key, value)
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            expected = "all of 3 dims, or of 2 without a batch"
        elif padding is not None and padding.dim() != query.dim() - 1:
            expected = f"a key_padding_mask of {query.dim() - 1} dims, not of shape {tuple(padding.shape)}"
        elif query.shape[-1] != self.embed_dim:
            expected = f"the last dim of query to be embed_dim, {self.embed_dim}"
        elif key.shape != value.shape and (self._qkv_same_embed_dim or key.shape[:-1] != value.shape[:-1]):
            expected = "key and value of one shape" + ("" if self._qkv_same_embed_dim else " but for the last dim")
        else:
            return
        shapes = ", ".join(
            f"{name} {tuple(t.shape)}" for name, t in zip(("query", "key", "value"), tokens, strict=True)
        )
        raise AssertionError(f"MultiheadAttention: the shapes are {shapes}; expected {expected}")

    def _length_first(self, x: Tensor, batched: bool) -> Tensor:
        """(length, batch, features), of a batch of one where there is none."""
        if not batched:
            return x.unsqueeze(1)
        return x.transpose(0, 1) if self.batch_first else x

    def _additive(
        self, padding: Tensor | None, mask: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """Both masks as PyTorch's module takes them: added, -inf for True."""
        other = F._none_or_dtype(mask)
        padding = F._canonical_mask(padding, "key_padding_mask", other, "attn_mask", dtype)
        return padding, F._canonical_mask(mask, "attn_mask", None, "", dtype, check_other=False)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of (length, batch, features), where one product makes those of one tensor."""
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        weights: tuple[Tensor, ...]
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return self._packed(query, self.in_proj_weight, self.in_proj_bias, 3)
        else:
            weights = self.in_proj_weight.chunk(3)
            if key is value:
                e = self.embed_dim
                bias = None if self.in_proj_bias is None else self.in_proj_bias.split([e, 2 * e])[1]
                k, v = self._packed(key, self.in_proj_weight.split([e, 2 * e])[1], bias, 2)
                return F.linear(query, weights[0], biases[0]), k, v
        q, k, v = (F.linear(*of) for of in zip((query, key, value), weights, biases, strict=True))
        return q, k, v

    def _packed(self, x: Tensor, weight: Tensor, bias: Tensor | None, count: int) -> Any:
        return F.linear(x, weight, bias).unflatten(-1, (count, self.embed_dim)).movedim(-2, 0).contiguous().unbind(0)

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """(length, batch, features) -> (batch, heads, length, head_dim), with the keys that the options add.

        By the views of PyTorch's module: a batch of one has other strides in other ones, and some products other bits.
        """
        n = q.shape[1]
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([t, bias.repeat(1, n, 1)]) for t, bias in ((k, self.bias_k), (v, self.bias_v)))
        q, k, v = (t.reshape(len(t), n * self.num_heads, self.head_dim).transpose(0, 1) for t in (q, k, v))
        if self.add_zero_attn:
            k, v = (torch.cat([t, t.new_zeros(len(t), 1, self.head_dim)], 1) for t in (k, v))
        return [t.view(n, self.num_heads, t.shape[1], self.head_dim) for t in (q, k, v)]

    def _joined(self, mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """One mask that broadcasts to (batch, heads, queries, keys); keys that the options added are not masked."""
        n, heads, length, _ = q.shape
        added = (self.bias_k is not None) + self.add_zero_attn
        keys = k.shape[-2] - added
        if mask is not None:
            expected = (length, keys) if mask.dim() == 2 else (n * heads, length, keys)
            if mask.shape != expected:
                raise RuntimeError(
                    f"MultiheadAttention: attn_mask has shape {tuple(mask.shape)}; expected {expected}: (queries, "
                    "keys), or one for each head of each sample"
                )
            mask = F.pad(mask, (0, added))
            mask = mask if mask.dim() == 2 else mask.unflatten(0, (n, heads))
        if padding is not None:
            if padding.shape != (n, keys):
                raise AssertionError(
                    f"MultiheadAttention: key_padding_mask has shape {tuple(padding.shape)}; expected {(n, keys)}"
                )
            padding = F.pad(padding, (0, added))[:, None, None]
            mask = padding if mask is None else mask + padding
        return mask

    def _with_weights(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """The output of each head and the weights, in PyTorch's operations for them."""
        size = (*q.shape[:-1], k.shape[-2])
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        q = q * math.sqrt(1.0 / self.head_dim)
        if mask is None:
            s = torch.bmm(q, k.mT)
        else:
            s = torch.baddbmm(mask.expand(size).flatten(0, 1), q, k.mT)
        p = self.point("p", torch.softmax(self.point("s", s.view(size)), -1))
        weights = F.dropout(p, dropout) if dropout else p
        return self.point("o", torch.bmm(weights.flatten(0, 1), v).unflatten(0, size[:2])), weights
