"""Secrets stay in the environment: a configuration that holds one is refused, and no error repeats it."""

import json
import string
from pathlib import Path

import pytest
from hypothesis import given as cases
from hypothesis import settings
from hypothesis import strategies as st

from rollout.credentials import Redacted, holds_credentials, redacted
from rollout.data import DataError
from services.config import Config, ConfigError, _field, field_paths, load
from services.jobs.submit import prepare

NEEDED = ["--policy.model=m", "--data.demonstrations=d"]
SECRET = "pl4nt3d-S3CR3T/with+slash"
URLS = [
    f"s3://AKIAEXAMPLE:{SECRET}@bucket/runs?region=eu-west-1",
    "https://user:pl4nt3d-S3CR3T@host:8443/x",
    "https://pl4nt3d-S3CR3T@host/x",
    "simplecache::s3://key:pl4nt3d-S3CR3T@bucket",
    "https://host/score?model=a&access_token=pl4nt3d-S3CR3T",
    "https://bucket.host/x?X-Amz-Signature=pl4nt3d-S3CR3T",
    "S3://KEY:pl4nt3d-S3CR3T@bucket",
]
HARMLESS = [
    "s3://bucket/runs?region=eu-west-1&endpoint_override=http://127.0.0.1:9000",
    "hdfs://user@namenode:8020/runs",
    "http://127.0.0.1:8080/score?version=2#top",
    "https://medium.com:443/@author/keys",
    "file:///data/a@b.jsonl",
    "mail me@host, see http://host",
    "{prompt}\n### key= value @ x:",
]
TEXTS = [
    path
    for path, section in field_paths().items()
    if section is None and (field := _field(path)) is not None and field.annotation is str
]


@pytest.mark.parametrize("url", URLS)
def test_credentials_are_seen_and_blanked(url):
    assert holds_credentials(url)
    assert "pl4nt3d" not in redacted(f"OSError: cannot open '{url}': denied")


@pytest.mark.parametrize("url", HARMLESS)
def test_what_is_no_credential_stands(url):
    assert not holds_credentials(url)
    if "hdfs" not in url:
        assert redacted(url) == url


@pytest.mark.parametrize("field", TEXTS)
def test_no_text_field_takes_a_url_with_credentials(field, tmp_path):
    assert {"run.mirror", "data.demonstrations", "discriminator.reward.user_reward"} <= set(TEXTS)
    file = tmp_path / "run.toml"
    for table in ("", "method.sft."):
        file.write_text(f"{table}{field} = {json.dumps(URLS[0])}\n")
        with pytest.raises(ConfigError) as refused:
            load(file, [word for word in NEEDED if not word.startswith(f"--{field}=")])
        assert str(refused.value).startswith(f"{table}{field}: the URL holds credentials")
        assert "pl4nt3d" not in str(refused.value)
    with pytest.raises(ConfigError, match="into the environment"):
        load(None, [*NEEDED, f"--{field}={URLS[1]}"])


@pytest.mark.parametrize("field", ["discriminator.reward.user_token", "discriminator.scoring.http_token"])
def test_a_token_in_the_place_of_its_variable_is_refused_and_not_repeated(field):
    with pytest.raises(ConfigError, match=f"{field}: give the name of an environment variable") as refused:
        load(None, [*NEEDED, f"--{field}=hf_pl4nt3d"])
    assert "pl4nt3d" not in str(refused.value)


@pytest.mark.parametrize(
    "words",
    [
        ["--data.demonstrations", "a", URLS[1]],
        [f"--data.max_prompt_tokens={URLS[1]}"],
        [f'--data.demonstrations=["{URLS[1]}"]'],
        [f"--{URLS[1]}=1"],
    ],
)
def test_other_errors_of_a_configuration_do_not_repeat_them(words):
    with pytest.raises(ConfigError) as refused:
        load(None, [*NEEDED, *words])
    assert "pl4nt3d" not in str(refused.value)


@pytest.mark.parametrize(
    ("address", "image"),
    [("http://user:pl4nt3d@head:8265", ""), ("http://head:8265", "docker://u:pl4nt3d@r/i")],
)
def test_the_submit_line_takes_none(tmp_path: Path, address, image):
    file = tmp_path / "run.toml"
    file.write_text('policy.model = "/m"\ndata.demonstrations = "/d"\nrun.output = "/o"\n')
    with pytest.raises(ConfigError, match="the URL holds credentials") as refused:
        prepare(file, [], address, image=image)
    assert "pl4nt3d" not in str(refused.value)


@pytest.mark.parametrize("kind", [ConfigError, DataError, Redacted])
@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "RLGAF_REWARD_TOKEN"])
def test_an_error_does_not_repeat_the_values_of_secret_variables(monkeypatch, kind, name):
    monkeypatch.setenv(name, "pl4nt3d-value")
    assert str(kind("Invalid header value b'Bearer pl4nt3d-value\\n'")) == (
        f"Invalid header value b'Bearer <{name}>\\n'"
    )


def test_a_configuration_without_credentials_is_taken():
    words = [
        "--run.mirror=s3://bucket/runs?region=eu",
        "--discriminator.reward.user_reward=http://127.0.0.1/x",
    ]
    assert isinstance(load(None, [*NEEDED, *words]), Config)


def _any_credentials(examples: int) -> None:
    word = st.text(string.ascii_letters + string.digits + "+/=-_.~%!$&(),;:", min_size=8, max_size=40)

    @settings(max_examples=examples, deadline=None, database=None)
    @cases(st.sampled_from(["s3", "gs", "https", "hf", "HTTP"]), word, word, st.text(max_size=20))
    def check(scheme: str, user: str, password: str, around: str) -> None:
        password = f"Z{password}"  # digits alone, and then a slash, are a port
        url = f"{scheme}://{user.replace('/', '')}:{password}@host/path"
        assert holds_credentials(url)
        assert password not in redacted(f"{around} {url} {around}").replace(around, "")

    check()


def test_any_user_and_password_are_seen():
    _any_credentials(300)


@pytest.mark.slow  # the same with ten thousand cases
def test_ten_thousand_users_and_passwords_are_seen():
    _any_credentials(10_000)
