"""What a run settles before anything is started."""

from datetime import date
from pathlib import Path

import pytest

from services.config import ConfigError, load
from services.config_text import to_toml
from services.run import with_today


def test_a_chat_run_keeps_the_date_on_which_it_began(tmp_path: Path) -> None:
    words = ["--policy.model=m", "--data.demonstrations=d", f"--run.output={tmp_path}", "--run.name=r"]
    chat = load(None, [*words, "--data.prompt_format=chat"])
    begun = with_today(chat, resume=False)
    assert begun.data.today == date.today()
    assert with_today(chat, resume=True).data.today == date.today(), "the folder has none to keep"
    begun.folder.mkdir()
    (begun.folder / "config.toml").write_text("[")
    with pytest.raises(ConfigError, match=r"config\.toml: not valid TOML"):
        with_today(chat, resume=True)
    yesterday = begun.data.model_copy(update={"today": date(2026, 11, 30)})
    (begun.folder / "config.toml").write_text(to_toml(begun.model_copy(update={"data": yesterday})))
    assert with_today(chat, resume=True).data.today == date(2026, 11, 30)
    assert with_today(load(None, words), resume=False).data.today is None
    chosen = load(None, [*words, "--data.prompt_format=chat", "--data.today=2024-07-26"])
    assert with_today(chosen, resume=True).data.today == date(2024, 7, 26)
