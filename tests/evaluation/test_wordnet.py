"""A small database in WordNet's own format: names and hypernyms by id, and errors for damaged files."""

import pytest

from zslflax.evaluation.wordnet import read_wordnet

LICENCE = "  1 This software and database is being provided to you\n  2 with bars | and 00000000 n\n"
SYNSETS = {  # words, and pointers to other synsets; "verb" is in another file
    "entity": (["entity"], [("~", "object"), ("~", "many")]),
    "object": (["object", "physical_object"], [("@", "entity"), ("+", "verb"), ("~", "river")]),
    "river": (["river"], [("@", "object"), ("@", "many"), ("~i", "Thames"), ("%p", "object")]),
    "Thames": (["Thames", "River_Thames", "Thames_River"], [("@i", "river"), ("-c", "entity")]),
    "many": ([f"word_{i}" for i in range(17)], [("@", "entity")]),  # their number is hexadecimal
}


def write(folder, synsets=SYNSETS, first=LICENCE):
    """Writes data.noun, every synset at the byte that its id says; returns the ids by name."""
    at, ids = len(first), {"verb": "01234567"}
    for name, parts in synsets.items():
        ids[name] = f"{at:08d}"
        at += len(line(*parts, "0" * 8, dict.fromkeys([*synsets, "verb"], "0" * 8)))
    text = first + "".join(line(*parts, ids[name], ids) for name, parts in synsets.items())
    (folder / "data.noun").write_bytes(text.encode())
    return {name: f"n{i}" for name, i in ids.items()}


def line(words, pointers, at, ids):
    fields = [at, "03", "n", f"{len(words):02x}", *(f"{word} 0" for word in words), f"{len(pointers):03d}"]
    fields += [f"{symbol} {ids[to]} {'v' if to == 'verb' else 'n'} 0000" for symbol, to in pointers]
    return " ".join(fields) + ' | a gloss | with a bar; "@ 00001740 n 0000"  \n'


def test_words_and_hypernyms_are_read_by_id(tmp_path):
    ids = write(tmp_path)
    wordnet = read_wordnet(tmp_path)
    assert set(wordnet.lemmas) == set(wordnet.hypernyms) == {ids[name] for name in SYNSETS}
    assert wordnet.lemmas[ids["Thames"]] == ("Thames", "River Thames", "Thames River")
    assert wordnet.lemmas[ids["many"]] == tuple(f"word {i}" for i in range(17))
    assert wordnet.hypernyms == {
        ids["entity"]: (),
        ids["object"]: (ids["entity"],),
        ids["river"]: (ids["object"], ids["many"]),
        ids["Thames"]: (ids["river"],),
        ids["many"]: (ids["entity"],),
    }
    assert wordnet.names([ids["object"], ids["river"]]) == ["object, physical object", "river"]


def test_missing_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="data.noun does not exist: .* wordnet-base"):
        read_wordnet(tmp_path)
    ids = write(tmp_path)
    path = tmp_path / "data.noun"
    whole = path.read_bytes()

    path.write_bytes(whole.replace(b"\n", b"\r\n"))  # then nothing is at the byte that ids say
    with pytest.raises(ValueError, match=rf"damaged at byte {len(LICENCE) + 2}: .* says that it is at 0"):
        read_wordnet(tmp_path)
    path.write_bytes(whole[: len(LICENCE) + 40])
    with pytest.raises(ValueError, match=f"damaged at byte {len(LICENCE)}: "):
        read_wordnet(tmp_path)
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))  # without "many", which "river" is a kind of
    with pytest.raises(ValueError, match=f"cut short: it lacks {ids['many']}, which is a hypernym"):
        read_wordnet(tmp_path)


def test_unknown_ids_are_refused(tmp_path):
    ids = write(tmp_path)
    with pytest.raises(ValueError, match="2 of 3 ids are not in this WordNet, the first is 'n99999999'"):
        read_wordnet(tmp_path).names(["n99999999", ids["river"], "cat"])
