"""What a run settles before anything is started."""

from datetime import date
from pathlib import Path

import pytest

from services.config import ConfigError, load
from services.config_text import to_toml
from services.run import with_day


def test_a_chat_run_keeps_the_date_on_which_it_began(tmp_path: Path) -> None:
    words = ["--policy.model=m", "--data.demonstrations=d", f"--run.output={tmp_path}", "--run.name=r"]
    chat = load(None, [*words, "--data.prompt_format=chat"])
    begun = with_day(chat, None)
    assert begun.data.today == date.today()
    file = tmp_path / "config.toml"
    assert with_day(chat, file).data.today == date.today(), "the checkpoint has none to keep"
    file.write_text("[")
    with pytest.raises(ConfigError, match=r"config\.toml: not valid TOML"):
        with_day(chat, file)
    yesterday = begun.data.model_copy(update={"today": date(2026, 11, 30)})
    file.write_text(to_toml(begun.model_copy(update={"data": yesterday})))
    assert with_day(begun, file).data.today == date(2026, 11, 30)
    assert with_day(load(None, words), None).data.today is None
    chosen = load(None, [*words, "--data.prompt_format=chat", "--data.today=2024-07-26"])
    assert with_day(chosen, None).data.today == date(2024, 7, 26)
