#!/usr/bin/python3
"""Makes testdata/: small random checkpoints and what the reference program says about them and the trained models.

  make_goldens.py --out testdata [--models models] [--only random-spark,spark-stories]

Needs python3-numpy and python3-sentencepiece. Everything is seeded: the same program makes the same numbers, up to
the order in which NumPy's BLAS adds (about 1e-12). Minutes on one core with an optimized BLAS; set
OPENBLAS_NUM_THREADS=1 to keep it to one.

Makes for NAME in random-spark, random-gemma2, spark-stories and, where --models has it, dense-stories:
  OUT/NAME/            the checkpoint, for the random ones only
  OUT/NAME.golden      prompts with ids, logits, active sets and greedy continuations (format below)
  OUT/valid_stats.json over valid_ids.txt, for the trained ones: NLL and mean active sets of each layer

A .golden file, little-endian: "FSGOLD1\\n", the header's size as u32, the header (JSON), then zlib streams. The header
has the model's sizes, the prompts (name, number of ids, positions with logits, number of continued tokens), and for
each section its offset past the header and its compressed and raw size. Sections hold the prompts one after the other:
  ids           i32 [T]
  logits        f32 rounded to multiples of 2^-13 (an error of at most 6.2e-5, well below any tolerance here, for half
                the size), as i32 in three planes of bytes: [3, positions with logits · V] with the lowest byte first
  continuation  i32 [C], C ≤ 64: greedy, ending with eos if that comes
  top_ids       i32 [C, 2]: the two largest logits where each continued token was chosen, the larger first
  top_logits    f32 [C, 2]
  ffn           Spark only, for each layer, then position: a set over F
  attention     Spark only, for each layer, then position, then head: a set over the n visible positions, the first
                of which is the oldest
A set over n: LEB128 of the number of elements missing from it if that is less than a third of n, plus 1, then the
missing elements; otherwise 0, LEB128 of its size, then its elements. Elements rise and are written as LEB128 of what
lies between each and the one before it.
"""
import argparse
import json
import os
import shutil
import struct
import tempfile
import zlib

import numpy as np

import spark_reference as reference

CONTINUED = 64
QUANTUM = 2.0**-13
TEXTS = [
    "Once upon a time, there was a little fox who lived at the edge of the forest.",
    "The old king had three daughters, and the youngest of them was",
    "\"Where are you going?\" asked the wolf.\n\n\"To the market,\" said Mary, \"to sell 12 eggs.\"",
    "It was the best of mornings. Tom woke up early, put on his red boots and ran down to the river, where his friend"
    " Lily was already waiting with a big basket. They wanted to find out why the",
    "Café, naïve, 你好 and 🦊: strange words, said the owl; she had never seen such letters before!",
    "CHAPTER I.\n\nMr. Harding had lived for many years in the quiet house behind the cathedral, and it was generally"
    " believed among his neighbours that nothing would ever induce him to leave it.",
]


class CachedModel(reference.Model):
    """The reference with a KV cache: forward() takes the ids that follow those it has seen."""

    def reset(self):
        self.keys, self.values, self.kept_sets = {}, {}, {}

    @staticmethod
    def rope_from(x, theta, start):
        padded = np.concatenate([np.zeros((start,) + x.shape[1:]), x])
        return reference.rope(padded, theta)[start:]

    def attention(self, x, layer, stats):
        c, p = self.c, f"model.layers.{layer}.self_attn."
        t, heads, kv, dim = len(x), c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        start = len(self.keys.get(layer, ()))
        r = c["attention_predictor_dim"] if self.spark else dim
        theta, scale = c["rope_theta"], c["query_pre_attn_scalar"] ** -0.5

        def rotated(name, count):
            y = (x @ self.w[p + name].T).reshape(t, count, dim)
            parts = [self.rope_from(part, theta, start) for part in np.split(y, [r], -1) if part.shape[-1]]
            return np.concatenate(parts, -1)

        q, k = rotated("q_proj.weight", heads), rotated("k_proj.weight", kv)
        v = (x @ self.w[p + "v_proj.weight"].T).reshape(t, kv, dim)
        k = self.keys[layer] = np.concatenate([self.keys[layer], k]) if start else k
        v = self.values[layer] = np.concatenate([self.values[layer], v]) if start else v
        sliding = c["layer_types"][layer] == "sliding_attention" if "layer_types" in c else layer % 2 == 0
        window = c["sliding_window"] if sliding else start + t
        out = np.zeros((t, heads, dim))
        sets = self.kept_sets.setdefault(layer, [])
        for i in range(t):
            end = start + i + 1
            lo = max(0, end - window)
            sets.append([])
            for h in range(heads):
                g = h * kv // heads
                keep, out[i, h] = self.attend(q[i, h], k[lo:end, g], v[lo:end, g], r, scale)
                sets[-1].append(keep)
        stats["attention_kept"].append(np.array([[keep.sum() for keep in s] for s in sets[start:]]))
        return out.reshape(t, heads * dim) @ self.w[p + "o_proj.weight"].T

    def attend(self, q, k, v, r, scale):
        c = self.c
        s = reference.softcap(k[:, :r] @ q[:r] * scale, c["attn_logit_softcapping"])
        keep = np.ones(len(s), bool)
        if self.spark and len(s) > c["attention_top_k"]:
            keep = s > reference.statistical_threshold(s, c["attention_top_k"])
            if not keep.any():
                keep[s.argmax()] = True
        e = np.exp(s[keep] - s[keep].max())
        a = e / e.sum()
        if self.spark:
            a = a * reference.softplus(k[keep, r:] @ q[r:] * scale)
        return keep, a @ v[keep]


def check_cached(model, plain, ids):
    """The cached model must say what the reference says, whole and in pieces."""
    want, stats = plain.forward(ids)
    cut = max(1, len(ids) * 2 // 3)
    model.reset()
    got = np.concatenate([model.forward(part)[0] for part in (ids[:cut], ids[cut:]) if len(part)])
    assert np.abs(got - want).max() < 1e-9, np.abs(got - want).max()
    for layer, sets in model.kept_sets.items():
        counts = np.array([[keep.sum() for keep in s] for s in sets])
        assert (counts == stats["attention_kept"][layer]).all()
        for i, row in enumerate(sets):
            for h, keep in enumerate(row):
                whole = np.unpackbits(stats["attention_mask"][layer][i, h])[: i + 1].astype(bool)
                assert (whole[i + 1 - len(keep) :] == keep).all()


def golden_prompt(model, name, ids, context, logit_positions):
    """One prompt's numbers, as plain arrays."""
    model.reset()
    logits, stats = model.forward(ids)
    attention = [[list(row) for row in model.kept_sets[i]] for i in range(len(model.kept_sets))]
    features = model.c["intermediate_size"]
    ffn = np.unpackbits(stats["ffn_mask"], axis=-1)[..., :features].astype(bool)
    eos = model.c["eos_token_id"]
    eos = eos if isinstance(eos, list) else [eos]
    last, continuation, top_ids, top_logits = logits[-1], [], [], []
    while len(continuation) < min(CONTINUED, context - len(ids)):
        two = np.argsort(-last, kind="stable")[:2]
        continuation.append(int(two[0]))
        top_ids.append(two)
        top_logits.append(last[two])
        if continuation[-1] in eos or len(continuation) == min(CONTINUED, context - len(ids)):
            break
        last = model.forward(continuation[-1:])[0][-1]
    return {
        "name": name, "ids": ids, "logit_positions": logit_positions, "logits": logits[logit_positions],
        "continuation": continuation, "top_ids": np.array(top_ids), "top_logits": np.array(top_logits),
        "ffn": ffn, "attention": attention,
    }


def sampled_positions(length, count):
    """The first, the last, and some between them."""
    return sorted({int(round(x)) for x in np.linspace(0, length - 1, count)})


def leb128(numbers):
    out = bytearray()
    for n in numbers:
        n = int(n)
        while n >= 128:
            out.append(n & 127 | 128)
            n >>= 7
        out.append(n)
    return out


def encode_set(mask):
    missing = np.flatnonzero(~mask)
    if 3 * len(missing) < len(mask):
        head, elements = [len(missing) + 1], missing
    else:
        elements = np.flatnonzero(mask)
        head = [0, len(elements)]
    gaps = np.diff(elements, prepend=-1) - 1
    if len(gaps) and gaps.max() >= 128:
        return leb128(head) + leb128(gaps)
    return leb128(head) + gaps.astype(np.uint8).tobytes()


def logit_planes(logits):
    steps = np.round(np.asarray(logits) / QUANTUM).astype("<i4").ravel()
    assert np.abs(steps).max(initial=0) < 2**23
    return steps.view(np.uint8).reshape(-1, 4)[:, :3].T.tobytes()


def write_golden(path, config, prompts):
    spark = config["model_type"] == "spark_gemma2"
    array = lambda key, dtype: b"".join(np.asarray(p[key], dtype).tobytes() for p in prompts)
    sections = {
        "ids": array("ids", "<i4"),
        "logits": b"".join(logit_planes(p["logits"]) for p in prompts),
        "continuation": array("continuation", "<i4"),
        "top_ids": array("top_ids", "<i4"),
        "top_logits": array("top_logits", "<f4"),
    }
    if spark:
        sections["ffn"] = b"".join(encode_set(m) for p in prompts for layer in p["ffn"] for m in layer)
        sections["attention"] = b"".join(
            encode_set(m) for p in prompts for layer in p["attention"] for row in layer for m in row)
    sliding = config.get("layer_types") or [
        "full_attention" if i % 2 else "sliding_attention" for i in range(config["num_hidden_layers"])]
    header = {
        "spark": spark, "vocab_size": config["vocab_size"], "intermediate_size": config["intermediate_size"],
        "heads": config["num_attention_heads"],
        # Positions a layer's window holds; 0: all of them.
        "windows": [config["sliding_window"] if s == "sliding_attention" else 0 for s in sliding],
        "quantum": QUANTUM,
        "prompts": [{"name": p["name"], "ids": len(p["ids"]), "logit_positions": p["logit_positions"],
                     "continuation": len(p["continuation"])} for p in prompts],
        "sections": {},
    }
    blob = b""
    for name, raw in sections.items():
        packed = zlib.compress(raw, 9)
        header["sections"][name] = {"offset": len(blob), "size": len(packed), "raw_size": len(raw)}
        blob += packed
        print(f"  {name}: {len(raw)} bytes, {len(packed)} compressed")
    text = json.dumps(header, separators=(",", ":")).encode()
    with open(path, "wb") as f:
        f.write(b"FSGOLD1\n" + struct.pack("<I", len(text)) + text + blob)


# ---- small random checkpoints ----

RANDOM = {
    # Sizes that are no multiple of a vector, heads that are no power of two, every optional key in use.
    "random-spark": {
        "model_type": "spark_gemma2", "vocab_size": 307, "hidden_size": 48, "intermediate_size": 200,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "query_pre_attn_scalar": 24, "sliding_window": 9,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "max_position_embeddings": 128, "rope_theta": 5000.0, "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": None, "rms_norm_eps": 1e-5, "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True, "attention_bias": False, "bos_token_id": 2, "eos_token_id": [1, 300],
        "ffn_predictor_dim": 20, "ffn_top_k": 16, "attention_predictor_dim": 6, "attention_top_k": 5,
    },
    "random-gemma2": {
        "model_type": "gemma2", "vocab_size": 261, "hidden_size": 40, "intermediate_size": 72,
        "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10,
        "query_pre_attn_scalar": 10, "sliding_window": 7, "max_position_embeddings": 128, "rope_theta": 10000.0,
        "attn_logit_softcapping": None, "final_logit_softcapping": 25.0, "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1,
    },
}
RANDOM_DTYPE = {"random-spark": "F32", "random-gemma2": "F16"}
RANDOM_LENGTHS = [1, 2, 5, 6, 9, 10, 31, 33, 64, 65, 100, 120]


def random_tensors(c, rng):
    d, f, a = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * a, c["num_key_value_heads"] * a
    r = c.get("ffn_predictor_dim")
    shapes = {"model.embed_tokens": (c["vocab_size"], d), "model.norm": (d,)}
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[layer + norm + "_layernorm"] = (d,)
        shapes[layer + "self_attn.q_proj"], shapes[layer + "self_attn.o_proj"] = (q, d), (d, q)
        shapes[layer + "self_attn.k_proj"] = shapes[layer + "self_attn.v_proj"] = (kv, d)
        shapes[layer + "mlp.gate_proj"] = (f, r or d)
        shapes[layer + "mlp.up_proj"] = (f, d - r if r else d)
        shapes[layer + "mlp.down_proj"] = (d, f)
    out = {}
    for name, shape in shapes.items():
        # Small embeddings and a large final norm: else a token mostly predicts itself, whatever the layers do.
        mean = 2.5 if name == "model.norm" else 0
        deviation = 0.2 if len(shape) == 1 else 0.1 if "embed" in name else 1.5 / np.sqrt(shape[1])
        out[name + ".weight"] = rng.normal(mean, deviation, shape).astype(np.float32)
    return out


def write_safetensors(path, tensors, dtype):
    header, blob = {"__metadata__": {"format": "pt"}}, b""
    for name, values in tensors.items():
        raw = values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [len(blob), len(blob) + len(raw)]}
        blob += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + blob)


def write_shards(folder, tensors, dtype, count):
    names = sorted(tensors)
    weight_map = {}
    for shard in range(count):
        mine = names[shard::count]
        file = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        write_safetensors(os.path.join(folder, file), {n: tensors[n] for n in mine}, dtype)
        weight_map.update({n: file for n in mine})
    size = sum(t.size for t in tensors.values()) * (4 if dtype == "F32" else 2)
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {"total_size": size}, "weight_map": weight_map}, f, indent=1, sort_keys=True)


def make_random(name, out):
    config, rng = RANDOM[name], np.random.default_rng(20250607 + len(name))
    folder = os.path.join(out, name)
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=2)
        f.write("\n")
    tensors = random_tensors(config, rng)
    with tempfile.TemporaryDirectory() as single:  # the reference reads one file only
        shutil.copy(os.path.join(folder, "config.json"), single)
        write_safetensors(os.path.join(single, "model.safetensors"), tensors, RANDOM_DTYPE[name])
        model, plain = CachedModel(single), reference.Model(single)
        if name == "random-spark":
            write_shards(folder, tensors, RANDOM_DTYPE[name], 3)
        else:
            shutil.copy(os.path.join(single, "model.safetensors"), folder)
    prompts, context = [], config["max_position_embeddings"]
    for i, length in enumerate(RANDOM_LENGTHS):
        ids = [2] + [int(x) for x in rng.integers(3, config["vocab_size"], length - 1)]
        check_cached(model, plain, ids)
        prompts.append(golden_prompt(model, f"random {i}", ids, context, sampled_positions(length, 8)))
    write_golden(os.path.join(out, name + ".golden"), config, prompts)


# ---- trained models ----

# (length, sequence of valid_ids.txt or a text of TEXTS by its negative index - 1)
STORY_PROMPTS = {
    "spark-stories": [
        (1, 0), (2, -1), (3, -3), (5, -2), (8, -1), (13, -2), (17, -4), (18, -1), (31, -5), (32, -6), (33, 3), (40, -4),
        (63, 4), (64, 5), (65, 6), (100, 7), (127, 8), (128, 12), (200, 1), (256, 0), (257, 13), (400, 14), (700, 12),
        (960, 13),
    ],
    "dense-stories": [
        (1, 0), (2, -1), (8, -3), (18, -1), (33, 3), (65, 6), (128, 12), (257, 13), (400, 14), (700, 12),
    ],
}


def make_stories(name, folder, out, valid):
    import sentencepiece

    model, plain = CachedModel(folder), reference.Model(folder)
    sp = sentencepiece.SentencePieceProcessor(model_file=os.path.join(folder, "tokenizer.model"))
    prompts = []
    for length, source in STORY_PROMPTS[name]:
        whole = valid[source] if source >= 0 else [model.c["bos_token_id"]] + sp.encode(TEXTS[-source - 1])
        ids = whole[:length]
        label = f"valid {source}" if source >= 0 else f"text {-source - 1}"
        if len(ids) != length:
            raise SystemExit(f"{label} has {len(whole)} ids, {length} wanted")
        if length in (3, 33, 400):
            check_cached(model, plain, ids)
        prompts.append(golden_prompt(model, f"{label}, {length} ids", ids, model.c["max_position_embeddings"],
                                     sampled_positions(length, 4)))
        print(f"{name}: {label}, {length} ids, continuation:", repr(sp.decode(prompts[-1]["continuation"]))[:100],
              flush=True)
    write_golden(os.path.join(out, name + ".golden"), model.c, prompts)
    return valid_stats(model, valid)


def valid_stats(model, valid):
    """Over every position of every sequence, each computed on its own from its first token on."""
    total = count = positions = 0
    ffn = attended = visible = 0
    windows = None
    for ids in valid:
        model.reset()
        logits, stats = model.forward(ids)
        lp = reference.log_softmax(logits[:-1])
        total -= lp[np.arange(len(ids) - 1), ids[1:]].sum()
        count += len(ids) - 1
        positions += len(ids)
        ffn = ffn + stats["ffn_active"].sum(-1)
        attended = attended + stats["attention_kept"].sum((-1, -2))
        visible = visible + np.array([sum(len(s[0]) for s in model.kept_sets[i]) for i in sorted(model.kept_sets)])
    heads = model.c["num_attention_heads"]
    return {
        "nll": total / count, "predicted_tokens": count, "positions": positions,
        "ffn_active_fraction": (ffn / positions / model.c["intermediate_size"]).tolist(),
        "attended_positions": (attended / positions / heads).tolist(),
        "attended_fraction": (attended / heads / visible).tolist(),
    }


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    root = os.path.join(here, "..", "..")
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default=os.path.join(root, "testdata"))
    p.add_argument("--models", default=os.path.join(root, "models"), help="a folder with the trained models")
    p.add_argument("--only", help="names, separated by commas")
    a = p.parse_args()
    names = a.only.split(",") if a.only else [*RANDOM, *STORY_PROMPTS]
    os.makedirs(a.out, exist_ok=True)
    with open(os.path.join(here, "valid_ids.txt")) as f:
        valid = [[int(x) for x in line.split()] for line in f]
    stats_path = os.path.join(a.out, "valid_stats.json")
    stats = {}
    if os.path.exists(stats_path):
        with open(stats_path) as f:
            stats = json.load(f)
    for name in names:
        folder = os.path.join(a.models, name)
        if name in RANDOM:
            make_random(name, a.out)
        elif os.path.exists(os.path.join(folder, "config.json")):
            stats[name] = make_stories(name, folder, a.out, valid)
            with open(stats_path, "w") as f:
                json.dump(stats, f, indent=1, sort_keys=True)
                f.write("\n")
        else:
            print(f"{name}: not in {a.models}, left as it is")


if __name__ == "__main__":
    main()
