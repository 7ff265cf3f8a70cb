"""Room 1: settings, presets, and the errors that come before any work."""
import dataclasses
import math
import re
import subprocess
import sys

import pytest
from conftest import ROOT, tiny_config, tiny_env

import train_gpt
from train_gpt import Config, UsageError


def error_of(**env) -> str:
    with pytest.raises(UsageError) as caught:
        Config.from_env({name.upper(): str(value) for name, value in env.items()})
    return str(caught.value)


def test_default_is_pr1541_with_ttt():
    config = Config.from_env({})
    assert (config.preset, config.ttt_enabled, config.muon_momentum, config.matrix_lr) == ("pr1541", True, 0.97, 0.03)
    assert (config.num_layers, config.model_dim, config.vocab_size, config.enable_looping_at) == (11, 512, 8192, 0.35)


COMMANDS = {  # as the submissions publish them
    "pr1541": "SEED=42 QK_GAIN_INIT=5.25 MUON_MOMENTUM=0.97 MATRIX_LR=0.03 TTT_ENABLED=1 TTT_LR=0.005 TTT_EPOCHS=3",
    "pr1395": "DATA_DIR=./data VOCAB_SIZE=4096 SEED=42",
    "pr1517": "VOCAB_SIZE=8192 QK_GAIN_INIT=5.25 RECUR_LAYERS=3,4,5 RECUR_START_STEP=2000 MUON_WD=0.095 "
              "EMA_DECAY=0.9965 WARMDOWN_FRAC=0.72 TTT_ENABLED=1 TTT_EPOCHS=18 TTT_LR=0.0003 TTT_FREEZE_BLOCKS=1 "
              "SEED=1337 MATRIX_CLIP_SIGMAS=9.5 MATRIX_LR=0.020"}


@pytest.mark.parametrize("preset", COMMANDS)
def test_published_commands_are_taken_as_they_stand(preset):
    env = dict(part.split("=") for part in COMMANDS[preset].split())
    config = Config.from_env({"PRESET": preset, **env})
    if preset == "pr1517":  # whose TTT comes before quantization
        assert config.prequant_ttt_enabled and not config.ttt_enabled
        assert (config.prequant_ttt_epochs, config.prequant_ttt_lr, config.prequant_ttt_freeze_blocks) == (18, 3e-4, 1)
        assert (config.ttt_epochs, config.ttt_lr) == (Config.ttt_epochs, Config.ttt_lr)
        assert (config.looped_layers, config.recur_start_step, config.warmdown_frac) == ([3, 4, 5], 2000, 0.72)
    else:
        assert (config.ttt_enabled, config.prequant_ttt_enabled) == (preset == "pr1541", False)


def test_what_a_name_means_is_the_presets_business():
    assert Config.from_env({"TTT_EPOCHS": "7"}).ttt_epochs == 7
    assert "TTT_FREEZE_BLOCKS is no setting here; did you mean TTT_" in error_of(TTT_FREEZE_BLOCKS=1)
    assert "TTT_LR means PREQUANT_TTT_LR with PRESET=pr1517: set one of them" in error_of(
        PRESET="pr1517", TTT_LR=0.1, PREQUANT_TTT_LR=0.1)


def test_values_of_the_other_presets():
    """What each sets beside the defaults."""
    expected = {
        "pr1858": dict(parallel_residual="plain", matrix_lr=0.022, muon_momentum=0.99, ttt_enabled=True, ttt_epochs=2),
        "pr1395": dict(vocab_size=4096, parallel_residual="lanes", parallel_residual_start=7, qk_gain_init=5.0,
                       matrix_lr=0.02, muon_momentum=0.99, muon_wd=0.09, ema_decay=0.997, warmdown_frac=0.667,
                       looped_layers=[4, 5], num_loops=1, recur_start_step=3000, max_skips=5, ve_layers="9,10",
                       ve_dim=128, embed_gptq_enabled=False, selective_pruning_enabled=True, ttt_enabled=False),
        "pr1517": dict(parallel_residual="none", looped_layers=[3, 4, 5], num_loops=1, recur_start_step=3000,
                       max_skips=5, matrix_lr=0.02, muon_momentum=0.99, warmdown_frac=0.667, matrix_clip_sigmas=9.5,
                       smear_gate_enabled=True, late_qat_threshold=0.15, gptq_calibration_batches=256,
                       prequant_ttt_enabled=False, ttt_enabled=False)}
    for preset, values in expected.items():
        config = Config.from_env({"PRESET": preset})
        assert {name: getattr(config, name) for name in values} == values
        assert config.quantizer == "sdclip", "as published; QUANTIZER=trellis is ours"


@pytest.mark.parametrize("env, said", [
    ({"RECUR_LAYERS": "3,x"}, "RECUR_LAYERS=3,x"), ({"RECUR_LAYERS": "\u00b2"}, "RECUR_LAYERS=\u00b2"),
    ({"RECUR_LAYERS": ",", "LOOP_END": "12"}, "LOOP_END < NUM_LAYERS"), ({"RUN_ID": "\u00e9"}, "RUN_ID=\u00e9"),
    ({"AUTHOR": "A\ncompliant: True"}, "printable text"), ({"RECUR_LAYERS": "3,11"}, "RECUR_LAYERS=3,11"),
    ({"VE_LAYERS": "11", "QUANTIZER": "sdclip"}, "VE_LAYERS=11"), ({"VE_LAYERS": "9"}, "QUANTIZER=trellis"),
    ({"SELECTIVE_PRUNING_ENABLED": "1"}, "QUANTIZER == 'sdclip'")])
def test_layer_lists_and_pieces_must_fit(env, said):
    assert said in error_of(**env)


def test_environment_overrides_preset_overrides_default():
    assert Config.from_env({"PRESET": "smoke"}).model_dim == train_gpt.PRESETS["smoke"]["model_dim"]
    assert Config.from_env({"PRESET": "smoke", "MODEL_DIM": "64"}).model_dim == 64
    assert not Config.from_env({"TTT_ENABLED": "0"}).ttt_enabled


def test_settings_in_force_are_what_is_not_default_and_what_the_packed_script_takes_for_granted():
    env = {"SEED": "7", "MATRIX_LR": "0.03", "DATA_DIR": "/home/somebody", "TOKENIZER_PATH": "/home/somebody/model"}
    always = {name: getattr(Config, name) for name in train_gpt.PACKED_FOR}
    assert Config.from_env(env).in_force() == {**always, "seed": 7, "ttt_enabled": True}


def test_whatever_differs_from_its_default_is_shown():
    """One setting at a time; but folders, and what only MODE=collect reads: an author's name could pose as a setting.
    """
    for field in dataclasses.fields(Config):
        choices, kind = field.metadata["choices"], type(field.default)
        value = next(x for x in choices if x != field.default) if choices else kind(not field.default) if kind in (
            bool, str) else field.default + 1
        shown = dataclasses.replace(Config(), **{field.name: "x" if kind is str and not choices else value})
        hidden = field.name.endswith(("_dir", "_path")) or field.metadata["room"] == "collect"
        assert (shown.in_force() == Config().in_force()) == hidden, field.name


@pytest.mark.parametrize("preset", train_gpt.PRESETS)
def test_settings_in_force_make_the_same_settings_again(preset):
    """What is as the default has it, but not as the preset has it, must be told, too."""
    made = Config(preset=preset, **train_gpt.PRESETS[preset])
    for name in {name for name, value in train_gpt.PRESETS[preset].items() if value != getattr(Config, name)}:
        config = dataclasses.replace(made, **{name: getattr(Config, name)} if name != "data_dir" else {})
        assert name == "data_dir" or config.in_force()[name] == getattr(Config, name)
        assert dataclasses.replace(made, **config.in_force()) == config


def test_the_defaults_are_the_contests_limits():
    assert Config().target_bytes == train_gpt.SUBMISSION_CAP_BYTES == 16_000_000
    assert Config().max_wallclock_seconds == train_gpt.TRAIN_LIMIT_SECONDS == train_gpt.EVAL_LIMIT_SECONDS == 600


def test_every_setting_has_a_meaning_and_numbers_have_a_range():
    for field in dataclasses.fields(Config):
        assert len(field.metadata["meaning"]) >= 5, field.name
        if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
            low, high = field.metadata["low"], field.metadata["high"]
            for value in (low - 1, high + 1, math.nan, math.inf):
                with pytest.raises(UsageError, match=field.name):
                    train_gpt.parse_setting(field.name, str(value), field)
            for value in (low, high):
                assert train_gpt.parse_setting(field.name, str(value), field) == value
        assert train_gpt.parse_setting(field.name, str(field.default), field) == field.default


@pytest.mark.parametrize("wrong, meant", [
    ("TTT_EPOCH", "TTT_EPOCHS"), ("MUON_MOMENTM", "MUON_MOMENTUM"), ("SEEED", "SEED"),
    ("MATRIX_LEARNING_RATE", "MATRIX_LR"), ("TRAIN_BATCH_TOKEN", "TRAIN_BATCH_TOKENS"),
    ("ITERATION", "ITERATIONS"), ("QK_GAIN", "QK_GAIN_INIT"), ("MAX_WALLCLOCK", "MAX_WALLCLOCK_SECONDS"),
    ("SWA_ENABLED", "SWA_EVERY"), ("EMA_ENABLED", "EMA_DECAY")])
def test_misspelt_name_is_reported_with_the_likely_one(wrong, meant):
    assert f"{wrong} is no setting here; did you mean {meant}?" in error_of(**{wrong: 1})


@pytest.mark.parametrize("name", ["HASH_EMBED_ENABLED", "LQER_ENABLED", "PARALLEL_START_LAYER", "MLP_CLIP_SIGMAS"])
def test_pieces_of_other_submissions_are_no_settings_here(name):
    """Taken for a stranger's, such a variable would make a run that is not what its command says."""
    assert f"{name} is no setting here (MODE=help" in error_of(**{name: 1})


@pytest.mark.parametrize("name", ["iterations", "Matrix_LR", "seed"])
def test_small_letters_are_a_mistake(name):
    with pytest.raises(UsageError, match=f"{name} is no setting here; did you mean {name.upper()}?"):
        Config.from_env({name: "1"})


def test_ordinary_environments_are_left_alone():
    names = """HOME PATH USER SHELL TERM LANG PWD OLDPWD HOSTNAME LOGNAME MAIL EDITOR PAGER DISPLAY TMPDIR
        VIRTUAL_ENV CONDA_PREFIX PYTHONPATH PYTHONHASHSEED OMP_NUM_THREADS MKL_NUM_THREADS
        CUDA_VISIBLE_DEVICES CUDA_HOME LD_LIBRARY_PATH RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
        GROUP_RANK ROLE_RANK ROLE_NAME MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID NCCL_DEBUG
        TORCH_NCCL_ASYNC_ERROR_HANDLING SLURM_JOB_ID SLURM_NODEID HF_HOME WANDB_PROJECT CI GITHUB_ACTIONS
        CUBLAS_WORKSPACE_CONFIG TRITON_CACHE_DIR XDG_DATA_DIRS SSH_AUTH_SOCK KUBERNETES_PORT RUNPOD_POD_ID
        PUBLIC_KEY NVIDIA_VISIBLE_DEVICES http_proxy no_proxy _ COLUMNS LINES SHLVL INVOCATION_ID""".split()
    assert Config.from_env(dict.fromkeys(names, "1")) == Config.from_env({})


@pytest.mark.parametrize("name, value, allowed", [
    ("ITERATIONS", "1e4", "a whole number from 1 to 1000000000"), ("ITERATIONS", "0", "a whole number from 1"),
    ("ITERATIONS", "-1", "a whole number from 1"),
    ("MATRIX_LR", "fast", "a number from 0 to 10"), ("MATRIX_LR", "nan", "a number from 0 to 10"),
    ("MAX_WALLCLOCK_SECONDS", "inf", "a number from 0 to 1000000"), ("TTT_ENABLED", "yes", "0 or 1"),
    ("COMPRESSOR", "zip", "one of brotli, lzma"), ("PRESET", "pr9999", "pr1541"),
    ("EMA_DECAY", "1", "a number from 0")])
def test_bad_value_names_variable_value_and_what_is_allowed(name, value, allowed):
    message = error_of(**{name: value})
    assert f"{name}={value!r} is not allowed" in message and allowed in message


@pytest.mark.parametrize("layers", ["1" * 5000, "1," * 300, "4,        12", "4,00000000012", "3,         4,x", "3, ,4"])
def test_endless_and_hidden_layers_are_refused(layers):
    assert "i.isdecimal()" in error_of(RECUR_LAYERS=layers)


def test_all_problems_are_reported_at_once():
    message = error_of(SEED="x", TTT_EPOCH=3, MODE="play")
    assert all(word in message for word in ("SEED='x'", "TTT_EPOCHS", "MODE='play'"))


@pytest.mark.parametrize("env, names", [
    (dict(num_heads=3), "NUM_HEADS=3"), (dict(num_kv_heads=3), "NUM_KV_HEADS=3"), (dict(rope_dims=17), "ROPE_DIMS=17"),
    (dict(loop_end=11), "LOOP_END=11"), (dict(loop_start=6), "LOOP_START=6"),
    (dict(embedding_dim=256), "EMBEDDING_DIM"),
    (dict(train_batch_tokens=1000), "TRAIN_BATCH_TOKENS=1000"), (dict(eval_stride=4096), "EVAL_STRIDE=4096"),
    (dict(micro_batch_tokens=100), "MICRO_BATCH_TOKENS=100"), (dict(ttt_chunk_tokens=1000), "TTT_CHUNK_TOKENS=1000"),
    (dict(max_wallclock_seconds=5), "GPTQ_RESERVE_SECONDS=40"), (dict(run_id="../x"), "RUN_ID=../x")])
def test_settings_that_do_not_fit_together_are_named(env, names):
    assert names in error_of(**env)


def test_loop_range_is_free_without_loops():
    assert Config.from_env({"NUM_LOOPS": "0", "LOOP_END": "40"}).num_loops == 0


def test_stored_settings_of_an_artifact_lie_between_preset_and_environment():
    stored = {"preset": "smoke", "model_dim": 128, "eval_stride": 16}
    config = Config.from_env({"EVAL_STRIDE": "32"}, stored)
    assert (config.preset, config.model_dim, config.eval_stride, config.vocab_size) == ("smoke", 128, 32, 1024)


@pytest.mark.parametrize("env", [{"MODEL_DIM": "192"}, {"NUM_LAYERS": "9"}, {"PRESET": "pr1541"}])
def test_environment_may_not_contradict_the_artifact(env):
    with pytest.raises(UsageError, match=f"{next(iter(env))}=.*artifact was made with"):
        Config.from_env(env, {"preset": "smoke", "model_dim": 128})


def test_scoring_an_artifact_tells_all_that_it_was_made_with():
    """The batches of its training, too; MODE=eval would else record the preset's."""
    made = Config.from_env({"PRESET": "smoke", "TRAIN_SEQ_LEN": "64", "TRAIN_BATCH_TOKENS": "512"})
    stored = train_gpt.artifact_header(made)["settings"]
    alone = Config.from_env({"MODE": "eval"}, stored)
    assert {**alone.in_force(), "mode": "train"} == {**made.in_force(), "mode": "train"}
    with pytest.raises(UsageError, match="TRAIN_SEQ_LEN=128, but the artifact was made with 64"):
        Config.from_env({"MODE": "eval", "TRAIN_SEQ_LEN": "128"}, stored)


@pytest.mark.parametrize("preset", [["pr1517"], {}, None, 5])
def test_an_artifact_with_a_preset_that_is_none_is_refused(preset):
    with pytest.raises(UsageError, match="PRESET=.* must be one of pr1541"):
        Config.from_env({"MODE": "eval"}, {"preset": preset})


def test_help_lists_every_variable_with_default_and_meaning(capsys):
    train_gpt.print_help()
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=\w)", text)]
    for field in dataclasses.fields(Config):
        entry, = (entry for entry in entries if entry.startswith(f"{field.name.upper()} "))
        limits = field.metadata
        assert limits["meaning"] in entry and f" {type(field.default).__name__} " in entry
        assert limits["low"] is None or f" [{limits['low']} to {limits['high']}]" in entry
        assert not limits["choices"] or f" [{', '.join(limits['choices'])}]" in entry


def test_import_has_no_side_effects(tmp_path):
    """No output, no file, no process group, no GPU: `import train_gpt` works anywhere."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import train_gpt as t; print(t.dist.is_initialized())"
    done = subprocess.run([sys.executable, "-B", "-c", code, str(ROOT)], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr, list(tmp_path.iterdir())) == ("False\n", "", [])


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config().seed = 3
    assert tiny_env(seed=3)["SEED"] == "3"
