"""The configuration: what is refused and how, overrides, defaults, and what importing costs."""

import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from services.config import ConfigError, load, parse_overrides
from services.config_text import to_toml

ROOT = Path(__file__).parents[2]
NEEDED = ["--policy.model=m", "--data.demonstrations=d.jsonl"]


def refusal(*overrides: str, toml: str | None = None, folder: Path | None = None) -> str:
    """The message with which these overrides (and this file) are refused."""
    path = None
    if toml is not None and folder is not None:
        path = folder / "run.toml"
        path.write_text(toml)
    with pytest.raises(ConfigError) as refused:
        load(path, [*NEEDED, *overrides])
    return str(refused.value)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("learner.learning_rate", "learner.lr"),
        ("learner.lrr", "learner.lr"),
        ("group_size", "sampling.group_size"),
        ("learner.group_size", "sampling.group_size"),
        ("discriminator.heath.enabled", "discriminator.health.enabled"),
        ("samplng.temperature", "sampling.temperature"),
    ],
)
def test_unknown_field_is_refused_with_a_suggestion(given, meant):
    message = refusal(f"--{given}=1")
    assert f"unknown field {given}" in message or f"unknown field {given.rsplit('.', 1)[0]}" in message
    if given != "learner.learning_rate":  # no letter in common with lr that a program could see
        assert meant in message or meant.rsplit(".", 1)[0] in message


def test_unknown_field_in_a_file_names_the_file_and_every_one_of_them(tmp_path):
    message = refusal(toml="[run]\nstep = 3\n[sampling]\ntemprature = 1.0\n", folder=tmp_path)
    assert f"{tmp_path / 'run.toml'}: unknown field run.step; did you mean run.steps" in message
    assert "unknown field sampling.temprature; did you mean sampling.temperature" in message


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["--run.exact=true", "--run.max_policy_lag=1"], ["run.exact", "run.max_policy_lag"]),
        (
            ["--learner.baseline=group", "--sampling.group_size=1"],
            ["learner.baseline", "sampling.group_size"],
        ),
        (["--rollout.max_model_len=20"], ["rollout.max_model_len = 20", "data.max_prompt_tokens"]),
        (["--sampling.top_p=0.9"], ["sampling.top_p = 0.9", "evaluation.top_p"]),
        (["--sampling.top_k=40"], ["sampling.top_k = 40"]),
        (["--learner.kl_estimator=k1"], ["learner", "kl_estimator"]),
        (["--learner.epochs=2", "--learner.loss=reinforce"], ["learner", "epochs", "ppo_clip"]),
        (["--data.test_fraction=0.45", "--data.heldout_fraction=0.45"], ["data", "fractions"]),
        (["--discriminator.body=encoder", "--discriminator.level=token"], ["discriminator", "causal"]),
        (["--learner.absorbing_end=true"], ["learner.absorbing_end", "discriminator.level"]),
        (
            [
                "--discriminator.reward.length_control=overlong",
                "--discriminator.reward.length_target=80",
                "--sampling.max_tokens=60",
            ],
            ["begins above 60 tokens", "length_target"],
        ),
        (
            [
                "--discriminator.loss=bradley_terry",
                "--discriminator.reward.form=bradley_terry",
                "--discriminator.level=token",
            ],
            ["pays for long responses", "score_centring", "absorbing_end"],
        ),
        (
            ["--learner.absorbing_end=true", "--discriminator.level=token", "--learner.gamma=1"],
            ["learner.absorbing_end", "learner.gamma below 1"],
        ),
        (
            [
                "--learner.absorbing_end=true",
                "--discriminator.level=token",
                "--discriminator.canonical.max_response_tokens=16",
                "--sampling.max_tokens=64",
            ],
            ["learner.absorbing_end", "canonical.max_response_tokens = 16", "sampling.max_tokens = 64"],
        ),
        (
            [
                "--discriminator.reward.length_control=deviation",
                "--discriminator.reward.length_target=80",
                "--sampling.max_tokens=60",
            ],
            ["length_target = 80", "sampling.max_tokens = 60"],
        ),
        (["--learner.gamma=0"], ["learner.gamma = 0", "last token"]),
        (["--learner.importance_cap=0.5"], ["importance_cap = 0.5", "1 or more"]),
        (
            ["--learner.loss=ppo_clip", "--learner.minibatches=64", "--run.prompts_per_step=16"],
            ["learner.minibatches = 64", "run.prompts_per_step = 16"],
        ),
        (
            ["--learner.warmup_steps=50", "--run.steps=50", "--learner.lr_schedule=linear"],
            ["learner.warmup_steps = 50", "after 50 updates"],
        ),
        (
            ["--discriminator.warmup_steps=900", "--run.steps=50", "--discriminator.lr_schedule=cosine"],
            ["discriminator.warmup_steps = 900", "never begins"],
        ),
        (
            ["--discriminator.loss=hinge", "--discriminator.reward.form=logit", "--learner.gumbel.weight=1"],
            ["learner.gumbel.objective", "sigmoid"],
        ),
        (["--run.steps=0"], ["run.steps", "0"]),
        (["--learner.lr=-1e-5"], ["learner.lr", "-1e-05"]),
        (["--learner.zero_stage=4"], ["learner.zero_stage", "4"]),
        (["--policy.dtype=float16"], ["policy.dtype", "float16"]),
        (["--run.steps=many"], ["run.steps", "many"]),
    ],
)
def test_contradictions_and_wrong_values_are_refused_by_name(overrides, names):
    message = refusal(*overrides)
    assert all(name in message for name in names), message


def test_empty_model_and_demonstrations_are_named_together():
    with pytest.raises(ConfigError) as refused:
        load(None)
    assert "policy.model is empty" in str(refused.value)
    assert "data.demonstrations is empty" in str(refused.value)


def test_a_byte_order_mark_is_read_over(tmp_path):
    text = '\ufeffrun.name = "r"\npolicy.model = "m"\ndata.demonstrations = "d"\n'
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    assert load(tmp_path / "run.toml").run.name == "r"


def test_overrides_that_python_cannot_parse_are_text():
    for text in ("[" * 5000, "9" * 5000):
        assert load(None, [*NEEDED, f"--data.system_prompt={text}"]).data.system_prompt == text


@pytest.mark.parametrize(
    "toml", ["[run\nsteps = 3", "steps = = 3", f"steps = {'[' * 5000}", f"steps = {'9' * 5000}"]
)
def test_file_that_is_not_toml(tmp_path, toml):
    assert "not valid TOML" in refusal(toml=toml, folder=tmp_path)


def test_binary_or_missing_file_or_folder(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        load(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match=r"binary\.toml: not valid TOML"):
        load(tmp_path / "binary.toml")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load(tmp_path)


@pytest.mark.parametrize("toml", ["run = 5\n", "[learner]\nlora = 4\n"])
def test_a_value_where_a_section_belongs(tmp_path, toml):
    message = refusal("--run.steps=3", "--learner.lora.rank=2", toml=toml, folder=tmp_path)
    assert "is a section" in message


def test_an_override_below_a_plain_field(tmp_path):
    message = refusal("--run.steps.more=3", toml="[run]\nsteps = 3\n", folder=tmp_path)
    assert "run.steps" in message


def test_an_override_of_a_whole_section():
    assert "run is a section" in refusal("--run=5")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--learner.lr", "1e-5"], {"learner.lr": 1e-5}),
        (["--learner.lr=1e-5"], {"learner.lr": 1e-5}),
        (["--run.seed", "-3"], {"run.seed": -3}),
        (["--a.b", "-0.5", "--c.d=-2"], {"a.b": -0.5, "c.d": -2}),
        (["--learner.betas", "[0.9, 0.95]"], {"learner.betas": [0.9, 0.95]}),
        (["--run.name", "plain words"], {"run.name": "plain words"}),
        (["--run.name", '"quoted"'], {"run.name": "quoted"}),
        (["--run.name=a=b"], {"run.name": "a=b"}),
        (["--policy.model", "org/model"], {"policy.model": "org/model"}),
        (["--data.demonstrations", "/a/b c.jsonl"], {"data.demonstrations": "/a/b c.jsonl"}),
        (
            ["--learner.lora.target_modules", '["q_proj", "v_proj"]'],
            {"learner.lora.target_modules": ["q_proj", "v_proj"]},
        ),
        (["--run.exact", "true"], {"run.exact": True}),
        (["--policy.end_of_response", '"\\n"'], {"policy.end_of_response": "\n"}),
        (["--data.system_prompt="], {"data.system_prompt": ""}),
        (["--data.prompt_template", "Q: {prompt}\nA:"], {"data.prompt_template": "Q: {prompt}\nA:"}),
        (["--run.steps=1", "--run.steps=2"], {"run.steps": 2}),
    ],
)
def test_overrides(words, expected):
    assert parse_overrides(words) == expected


@pytest.mark.parametrize(
    "words", [["learner.lr", "1"], ["--learner.lr"], ["--learner.lr", "--run.steps"], ["-x"]]
)
def test_words_that_are_no_override(words):
    with pytest.raises(ConfigError, match=r"override|value is missing"):
        parse_overrides(words)


@pytest.mark.parametrize("name", ["2024", "007", "1e5", "true", "2024-05-01"])
def test_a_text_field_takes_text_that_looks_like_another_type(name):
    """`--run.name 2024` is a name, whatever TOML would make of it."""
    assert load(None, [*NEEDED, "--run.name", name]).run.name == name
    assert load(None, [*NEEDED, f"--run.name={name}"]).run.name == name


def test_an_override_can_be_none(tmp_path):
    """A field that a file sets can go back to its default from the command line."""
    (tmp_path / "run.toml").write_text("[data]\nmax_demonstrations = 5\n")
    assert (
        load(tmp_path / "run.toml", [*NEEDED, "--data.max_demonstrations=none"]).data.max_demonstrations
        is None
    )


@pytest.mark.parametrize("said", ["none", '"none"'])
def test_what_is_emptied_stays_empty_in_the_runs_own_file(tmp_path, said):
    """Also where the default is a number."""
    config = load(None, [*NEEDED, f"--learner.importance_cap={said}", f"--learner.critic.clip={said}"])
    assert (config.learner.importance_cap, config.learner.critic.clip) == (None, None)
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert load(tmp_path / "run.toml") == config


def test_none_is_a_word_where_a_field_cannot_be_empty():
    assert "learner.lr" in refusal("--learner.lr=none")
    assert load(None, [*NEEDED, "--run.name=none"]).run.name == "none"


def test_a_discriminator_that_trains_along_counts_its_warm_up_too():
    words = [
        "--run.steps=10",
        "--discriminator.warmup_max_steps=7",
        "--discriminator.steps_per_policy_step=3",
    ]
    assert load(None, [*NEEDED, *words]).discriminator_updates == 7 + 10 * (3 + 1)
    assert load(None, [*NEEDED, *words, "--discriminator.frozen=true"]).discriminator_updates == 7


def test_evaluations_draw_from_what_is_trained():
    assert load(None, NEEDED).evaluation_sampling == {"temperature": 1.0, "top_p": 1.0}
    colder = [*NEEDED, "--sampling.temperature=0.7"]
    assert load(None, colder).evaluation_sampling["temperature"] == 0.7
    assert load(None, [*colder, "--evaluation.temperature=0.2"]).evaluation_sampling["temperature"] == 0.2


def test_a_short_run_may_end_in_its_warm_up():
    assert load(None, [*NEEDED, "--learner.warmup_steps=10", "--run.steps=2"]).learner.warmup_steps == 10


def test_sft_is_not_held_to_what_it_does_not_read():
    given = [*NEEDED, "--run.method=sft", "--learner.absorbing_end=true", "--learner.advantage=grpo"]
    assert load(None, [*given, "--sampling.group_size=1", "--learner.warmup_steps=500"])


def test_overrides_beat_the_file(tmp_path):
    (tmp_path / "run.toml").write_text("[learner]\nlr = 1e-3\nbetas = [0.5, 0.6]\n[run]\nsteps = 7\n")
    config = load(tmp_path / "run.toml", [*NEEDED, "--learner.lr", "1e-5"])
    assert (config.learner.lr, config.learner.betas, config.run.steps) == (1e-5, (0.5, 0.6), 7)


@pytest.mark.parametrize("module", ["services.config", "services.plan", "services.cli", "services.ledger"])
def test_configuration_imports_nothing_heavy(module):
    code = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'deepspeed', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_dry_run_prints_configuration_and_plan_quickly_and_makes_nothing(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "services.cli", "train", "--dry-run"]
    (tmp_path / "run.toml").write_text(
        f'policy.model = "no/where"\ndata.demonstrations = "{tmp_path}"\nrun.output = "{tmp_path}/runs"\n'
    )
    (tmp_path / "d.jsonl").write_text('{"prompt": "p", "response": "r"}\n')
    began = time.monotonic()
    done = subprocess.run(
        [*command, str(tmp_path / "run.toml"), "--learner.lr", "1e-5", "--run.seed", "4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr[-2000:]
    printed = tomllib.loads(done.stdout)
    assert printed["learner"]["lr"] == 1e-5
    assert printed["run"]["seed"] == 4
    assert "# rollout" in done.stdout
    assert "# total" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "ray", "vllm", "transformers"}
    assert not (tmp_path / "runs").exists()
    assert seconds < 10, "about a second on a machine at rest"


def test_discount_follows_the_level_unless_it_is_set():
    assert load(None, NEEDED).gamma == 1.0
    assert load(None, [*NEEDED, "--discriminator.level=token"]).gamma == 0.25
    assert load(None, [*NEEDED, "--discriminator.level=token", "--learner.gamma=0.5"]).gamma == 0.5


def test_longest_sequence_follows_prompt_and_response_unless_it_is_set():
    assert load(None, [*NEEDED, "--data.max_prompt_tokens=10", "--sampling.max_tokens=5"]).max_model_len == 15
    assert load(None, [*NEEDED, "--rollout.max_model_len=1000"]).max_model_len == 1000


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "-x",
        "_x",
        "a/x",
        "/x",
        "a\\x",
        "a\n",
        "a b",
        "ü",
        "a\u0301",
        "x" * 65,
        "٣",
    ],
)
def test_a_name_is_a_name(name):
    """It becomes a folder, a label of metrics and part of addresses."""
    with pytest.raises(ConfigError, match=r"^run\.name: .* is no name: give at most 64") as refused:
        load(None, [*NEEDED, f"--run.name={name}"])
    assert len(str(refused.value).splitlines()) == 1
    for good in ("x" * 64, "7", "A.b_c-9"):
        assert load(None, [*NEEDED, f"--run.name={good}"]).run.name == good


@pytest.mark.parametrize("output", ["a\nb", "~nobody-of-this-name/runs"])
def test_an_output_that_can_be_no_folder(output):
    with pytest.raises(ConfigError, match=r"^run\.output: .* is no folder: ") as refused:
        load(None, [*NEEDED, f"--run.output={output}"])
    assert len(str(refused.value).splitlines()) == 1
