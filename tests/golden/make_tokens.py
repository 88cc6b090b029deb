#!/usr/bin/env python3
"""Token fixtures made by the `tokenizers` package: make_tokens.py SHARED_DIR OUT.json [cases per tokenizer] [seed].
Random text over many scripts, white space, combining marks, emoji and added tokens, for the tokenizers of the shared
data and for small ones made here so that every component of tokenizer.json is exercised."""
import json
import random
import sys

from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors,
                        trainers)

WORDS = ("the of and a to in is you that it he was for on are as with his they I'm don't we'll they've it's I'd 'S 'LL "
         "Hello World HELLO naïve café e\u0301 résumé Å \u212b ﬁ ½ ① ² 12 3456 3.14 0x7f foo_bar a-b C++ x=y; "
         "привет мир Ѐ שלום שָׁלוֹם مرحبا ١٢٣ नमस्ते สวัสดี 你好 世界 こんにちは 안녕하세요 한글 ẞ ſ İ ı Σς 'ſ ᾳ "
         "🙂 👩‍👩‍👧 🏳️‍🌈 … — “quoted” «x» ... !!! ??? \u200b \u200d \ufeff \u00ad \u180e \u0085 \u00a0 \u3000 \u2028 "
         "\t \n \r\n \n\n \x0b \x0c \x00 \x1f \x7f \ufffd ▁ ▁▁ <unk> <s> </s> [CLS] [MASK] <|endoftext|> <|im_start|> "
         "<mask> <0x0A> Ġ Ċ do not n't").split(" ")
ALPHABETS = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0x97F),
             (0xE00, 0xE7F), (0x1100, 0x11FF), (0x1E00, 0x1FFF), (0x2000, 0x2BFF), (0x3000, 0x30FF), (0x4E00, 0x4EFF),
             (0xAC00, 0xACFF), (0xF900, 0xFFEF), (0x1D400, 0x1D7FF), (0x1F300, 0x1F6FF), (0x1100, 0xFFFF),
             (0x10000, 0x1FFFF)]


def text_of(rng):
    out = []
    style = rng.random()
    for _ in range(rng.choice((1, 2, 3, 5, 8, 20, 60))):
        if rng.random() < (0.85 if style < 0.7 else 0.3):
            out.append(rng.choice(WORDS))
        else:
            lo, hi = rng.choice(ALPHABETS)
            out.append("".join(chr(rng.randint(lo, hi)) for _ in range(rng.randint(1, 6))))
        out.append(rng.choice(("", " ", " ", " ", "  ", "   ", "\n", " \n ", "\t")))
    return "".join(c for c in "".join(out) if not 0xD800 <= ord(c) < 0xE000 and c != "\x00")


def small_bpe(corpus, pre, **options):
    t = Tokenizer(models.BPE(**options))
    t.pre_tokenizer = pre
    byte = isinstance(pre, pre_tokenizers.ByteLevel) or "ByteLevel" in str(pre)
    t.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=330, show_progress=False, limit_alphabet=400 if byte else 120, special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if byte else [],
        **{k: v for k, v in options.items() if k in ("continuing_subword_prefix", "end_of_word_suffix")}))
    return t


def tokenizers(rng):
    corpus = [text_of(rng) for _ in range(60)]
    P, N, D = pre_tokenizers, normalizers, decoders
    cl100k = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    odd = r"\d{1,2}|\p{Lu}?\p{Ll}+|[^\s\w]+\s?|\S"
    pres = {
        "bytelevel": P.ByteLevel(add_prefix_space=False), "bytelevel-space": P.ByteLevel(add_prefix_space=True),
        "llama3": P.Sequence([P.Split(Regex(cl100k), "isolated"), P.ByteLevel(add_prefix_space=False, use_regex=False)]),
        "falcon": P.Sequence([P.Punctuation("contiguous"), P.ByteLevel(add_prefix_space=False), P.Digits(False),
                              P.Split(Regex("[0-9][0-9][0-9]"), "isolated")]),
        "digits": P.Sequence([P.Digits(True), P.ByteLevel(add_prefix_space=False)]),
        "odd": P.Sequence([P.Split(Regex(odd), "isolated"), P.ByteLevel(add_prefix_space=False, use_regex=False)]),
        "whitespace": P.Whitespace(), "whitespacesplit": P.WhitespaceSplit(), "bert": P.BertPreTokenizer(),
        "punct-prev": P.Punctuation("merged_with_previous"), "punct-next": P.Punctuation("merged_with_next"),
        "split-removed": P.Split(" ", "removed"), "split-invert": P.Split(Regex(r"\w+"), "removed", invert=True),
        "split-contiguous": P.Split(Regex(r"[ -]"), "contiguous"),
        "metaspace": P.Metaspace(), "metaspace-first": P.Metaspace(prepend_scheme="first"),
        "metaspace-nosplit": P.Metaspace(prepend_scheme="never", split=False), "delimiter": P.CharDelimiterSplit("-"),
    }
    for name, pre in pres.items():
        yield name, small_bpe(corpus, pre, unk_token="<unk>", fuse_unk=rng.random() < 0.5)
    norms = {
        "nfc": N.NFC(), "nfd": N.NFD(), "nfkc": N.NFKC(), "nfkd": N.NFKD(), "lowercase": N.Lowercase(),
        "strip": N.Strip(), "strip-left": N.Strip(True, False), "accents": N.Sequence([N.NFD(), N.StripAccents()]),
        "bert": N.BertNormalizer(), "bert-cased": N.BertNormalizer(True, True, False, False),
        "replace-regex": N.Sequence([N.Replace(Regex(r"\s+"), " "), N.Replace("a", "bc")]),
        "prepend": N.Sequence([N.Prepend("▁"), N.Replace(" ", "▁")]),
    }
    for name, norm in norms.items():
        t = small_bpe(corpus, P.WhitespaceSplit(), unk_token="<unk>")
        t.normalizer = norm
        t.add_tokens([AddedToken("Word", normalized=True), AddedToken("the", single_word=True, normalized=False),
                      AddedToken("x=y", lstrip=True), AddedToken("foo", rstrip=True)])
        t.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
        yield "norm-" + name, t
    yield "suffix", small_bpe(corpus, P.WhitespaceSplit(), unk_token="<unk>", end_of_word_suffix="</w>")
    yield "prefix", small_bpe(corpus, P.WhitespaceSplit(), unk_token="<unk>", continuing_subword_prefix="##")
    t = small_bpe(corpus, P.ByteLevel(add_prefix_space=False), ignore_merges=True)
    t.decoder = D.ByteLevel()
    t.add_special_tokens(["<|endoftext|>", "<|im_start|>"])
    t.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    yield "ignore-merges", t
    t = small_bpe(corpus, P.Metaspace(), unk_token="<unk>")
    t.decoder = D.Metaspace()
    t.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    yield "dec-metaspace", t
    t = small_bpe(corpus, P.WhitespaceSplit(), unk_token="<unk>", end_of_word_suffix="</w>")
    t.decoder = D.BPEDecoder()
    yield "dec-bpe", t
    t = small_bpe(corpus, P.Whitespace(), unk_token="<unk>")
    t.decoder = D.Sequence([D.Replace(Regex(r"[aeiou]"), "*"), D.Strip("h", 1, 0), D.Fuse()])
    yield "dec-sequence", t


def main():
    shared, out = sys.argv[1], sys.argv[2]
    n = int(sys.argv[3]) if len(sys.argv) > 3 else 12
    rng = random.Random(int(sys.argv[4]) if len(sys.argv) > 4 else 1)
    sets = []
    for name in ("tokenizers/gpt2", "tokenizers/qwen2", "tokenizers/llama-spm", "tokenizers/bert-base-uncased",
                 "tokenizers/roberta-base", "models/stories260K", "models/tinystories-656k", "models/babyllama105",
                 "models/tiny-random-bert"):
        sets.append((name, name, Tokenizer.from_file(f"{shared}/data/{name}/tokenizer.json")))
    small = max(4, n // 4)
    for name, t in tokenizers(rng):
        sets.append((name, json.loads(t.to_str()), t))
    result = []
    for name, source, t in sets:
        # The package decodes an added token that is matched on normalised text as its *normalised* content, which then is
        # no special token any more: those texts are not compared.
        renamed = t.normalizer is not None and any(
            a.normalized and t.normalizer.normalize_str(a.content) != a.content
            for a in t.get_added_tokens_decoder().values())
        cases = []
        for _ in range(n if isinstance(source, str) else small):
            text = text_of(rng)
            ids = t.encode(text, add_special_tokens=False).ids
            with_special = t.encode(text).ids
            decoded = [None if renamed else t.decode(with_special, skip_special_tokens=skip) for skip in (False, True)]
            cases.append([text, ids, with_special] + decoded)
        result.append({"name": name, "tokenizer": source, "cases": cases})
    with open(out, "w", encoding="utf-8") as f:
        json.dump(result, f, ensure_ascii=True, separators=(",", ":"))


main()
