"""What is asked about the flags."""

from flag_queries import flag_of, is_neutral


def test_every_spelling_of_a_flag_is_recognised():
    words = ("--lr", "--lr=0.1", "--learning_rate", "lr", "--learning-rate", "--learning-rate=0.1", "learning-rate")
    assert {flag_of(word) for word in words} == {"learning_rate"}
    assert flag_of("--no-pretrained") == "pretrained" and flag_of("--unknown") == "--unknown"


def test_where_a_run_computes_is_neutral_and_what_it_computes_is_not():
    assert is_neutral("device") and is_neutral("wandb_name")
    assert not (is_neutral("sync_bn") or is_neutral("batch_size") or is_neutral("amp"))
