from cadapt.data.classes import match_classes


def test_same_classes_in_another_order():
    match = match_classes(["a", "b", "c"], ["c", "a", "b"])
    assert match.complete
    assert match.index_map == {0: 2, 1: 0, 2: 1}


def test_missing_and_unknown():
    match = match_classes(["cat", "dog", "owl"], ["dog", "fox"])
    assert match.missing_in_data == ("cat", "owl")
    assert match.unknown_to_model == ("fox",)
    assert match.index_map == {0: 1}
    assert not match.complete


def test_names_match_exactly():
    assert match_classes(["Cat"], ["cat"]).unknown_to_model == ("cat",)
