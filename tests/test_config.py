"""The configuration: defaults, what goes over what, what is refused and how it is said, folders, descriptions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ConfigDict

from modelium.config import Config, Paths, cache_dir, load_config, parse_size, validate_sections
from modelium.configdoc import commented_yaml, schema, schema_text
from modelium.errors import ConfigError

HOME = {"HOME": "/home/ann"}


class ToySection(BaseModel):
    """A toy runtime."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    enabled: bool = True
    """Whether it is used."""
    token: str = ""
    """What it logs in with."""
    size: int | None = None


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "modelium.yaml") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refused(text: str = "", environ: dict[str, str] | None = None, flags: dict[str, Any] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(write(text), environ=environ or {}, flags=flags)
    return caught.value.message.splitlines()


class TestReading:
    def test_an_empty_file_and_none_at_all_are_the_defaults(self) -> None:
        defaults = Config().model_dump()
        assert load_config(environ={}).model_dump() == defaults
        for text in ("", "# nothing\n", "server:\norchestration:\n  policies:\nbrain:\n"):
            assert load_config(write(text), environ={}).model_dump() == defaults

    def test_flags_over_environment_over_file_over_defaults(self) -> None:
        write("server: {port: 1, grpc_port: 2, host: 0.0.0.0}")
        config = load_config(
            environ={"MODELIUM_SERVER__PORT": "3", "MODELIUM_SERVER__GRPC_PORT": "4"},
            flags={"server.port": ("--port", 5)},
        )
        assert (config.server.port, config.server.grpc_port, config.server.host) == (5, 4, "0.0.0.0")
        assert config.file == Path("modelium.yaml").absolute()

    def test_environment_values_are_yaml(self) -> None:
        config = load_config(
            environ={
                "MODELIUM_ORCHESTRATION__POLICIES__ALWAYS_LOADED": "[a, 'b-*']",
                "MODELIUM_ORCHESTRATION__POLICIES__DEVICE_BUDGET_BYTES": '{"cpu:0": 2GB}',
                "MODELIUM_METRICS__ENABLED": "no",
                "MODELIUM_EVICTION__NAME": "biggest",
                "MODELIUM_EVICTION__HALF_LIFE_S": "3.5",
            }
        )
        assert config.policies.always_loaded == ("a", "b-*")
        assert config.policies.device_budget_bytes == {"cpu:0": 2_000_000_000}
        assert not config.metrics.enabled
        assert config.eviction.settings == {"half_life_s": 3.5}

    def test_other_variables_are_not_configuration(self) -> None:
        others = {"MODELIUM_URL": "http://h", "MODELIUM_CACHE_DIR": "/c", "MODELIUMX__A": "1", "PATH": "/bin"}
        assert load_config(environ=others).model_dump() == Config().model_dump()

    def test_the_file_may_be_named_by_a_variable(self) -> None:
        write("server: {port: 7}", "elsewhere/m.yaml")
        assert load_config(environ={"MODELIUM_CONFIG": "elsewhere/m.yaml"}).server.port == 7

    def test_relative_folders_are_relative_to_what_names_them(self, tmp_path: Path) -> None:
        write("orchestration: {root: data, incoming_directory: ../drop}", "etc/m.yaml")
        config = load_config(Path("etc/m.yaml"), environ={}, flags={"orchestration.model_repository": ("-r", "repo")})
        paths = config.paths(HOME)
        assert paths.root == tmp_path / "etc/data"
        assert paths.incoming == tmp_path / "drop"
        assert paths.repository == tmp_path / "repo"


class TestRefusing:
    def test_unknown_keys_with_place_and_suggestion(self) -> None:
        assert refused("server:\n  prot: 80\n") == [
            "modelium.yaml line 2: unknown key server.prot; did you mean 'port'? "
            "(known in server: allowed_hosts, allowed_origins, client_stall_s, data_path, grpc_port, host, "
            "max_body_bytes, max_json_bytes, port, socket_directory, tls)"
        ]
        (line,) = refused("orchestration:\n  policies:\n    evict_after_idle_second: 3")
        assert line.startswith(
            "modelium.yaml line 3: unknown key orchestration.policies.evict_after_idle_second; "
            "did you mean 'evict_after_idle_seconds'?"
        )
        (line,) = refused(environ={"MODELIUM_LOGGING__LEVLE": "info"})
        assert line.startswith("MODELIUM_LOGGING__LEVLE: unknown key logging.levle; did you mean 'level'?")

    def test_each_bad_value_has_a_line_of_its_own(self) -> None:
        lines = refused(
            "server: {port: 70000}\nlogging:\n  level: loud\nmetrics: 4",
            environ={"MODELIUM_ORCHESTRATION__POLICIES__DEVICE_BUDGET_BYTES": '{"cpu:0": 2GX}'},
            flags={"server.grpc_port": ("--grpc-port", "many")},
        )
        assert sorted(lines) == [
            "--grpc-port: server.grpc_port should be a valid integer, unable to parse string as an integer, not 'many'",
            "MODELIUM_ORCHESTRATION__POLICIES__DEVICE_BUDGET_BYTES: orchestration.policies.device_budget_bytes.cpu:0: "
            "a size is a number of bytes or a text like 2GB or 1.5GiB, not '2GX'",
            "modelium.yaml line 1: server.port should be less than or equal to 65535, not 70000",
            "modelium.yaml line 3: logging.level should be 'debug', 'info', 'warning' or 'error', not 'loud'",
            "modelium.yaml line 4: metrics should be a section with keys of its own, not 4",
        ]

    def test_one_port_for_two_servers(self) -> None:
        (line,) = refused("server: {port: 8001}")
        assert line.startswith("modelium.yaml line 1: server: port and grpc_port are both 8001")
        assert load_config(write("server: {port: 0, grpc_port: 0}"), environ={}).server.port == 0

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("server: [", "modelium.yaml line 1: this is not YAML"),
            ("- 1\n", "modelium.yaml line 1: expected sections like `server:`"),
            ("server: {port: 1}\nserver: {port: 2}", "modelium.yaml line 2: server is written twice"),
            ("server:\n  port: 1\n  port: 2", "modelium.yaml line 3: server.port is written twice"),
            ("a: !!python/object:os.system {}", "modelium.yaml line 1: this is not YAML"),
        ],
    )
    def test_files_that_are_not_a_configuration(self, text: str, said: str) -> None:
        (line,) = refused(text)
        assert line.startswith(said)

    def test_a_file_that_is_not_there(self) -> None:
        with pytest.raises(ConfigError, match=r"can't read the configuration file no\.yaml.*No such file"):
            load_config(Path("no.yaml"), environ={})

    def test_variables_that_are_no_keys(self) -> None:
        assert "MODELIUM___PORT names no key" in refused(environ={"MODELIUM___PORT": "1"})[0]
        assert "MODELIUM_SERVER__PORT is not YAML" in refused(environ={"MODELIUM_SERVER__PORT": "["})[0]
        nested = {"MODELIUM_SERVER__PORT": "1", "MODELIUM_SERVER__PORT__X": "1"}
        assert "port was given a value of its own" in refused(environ=nested)[0]


class TestSections:
    def test_plugins_sections_are_validated_by_their_models(self) -> None:
        config = load_config(write("toy: {enabled: no}"), environ={"MODELIUM_TOY__SIZE": "4"})
        assert validate_sections(config, {"toy": ToySection}) == {"toy": ToySection(enabled=False, size=4)}
        assert validate_sections(load_config(write("toy:"), environ={}), {"toy": ToySection}) == {"toy": ToySection()}
        assert validate_sections(Config(), {"toy": ToySection}) == {"toy": ToySection()}

    def test_sections_that_nobody_owns_and_bad_values_are_all_said(self) -> None:
        text = "tyo: {}\ntoy:\n  sise: 3\n  token: {very: secret}\n"
        config = load_config(write(text), environ={"MODELIUM_OTHER__X": "1"})
        with pytest.raises(ConfigError) as caught:
            validate_sections(config, {"toy": ToySection})
        lines = caught.value.message.splitlines()
        assert lines[0].startswith("MODELIUM_OTHER__X: unknown key other (known: brain,")
        assert "install that (modelium-plugin-other)" in lines[0]
        assert lines[1].startswith("modelium.yaml line 1: unknown key tyo; did you mean 'toy'?")
        assert sorted(lines[2:]) == [
            "modelium.yaml line 3: unknown key toy.sise; did you mean 'size'? (known in toy: enabled, size, token)",
            "modelium.yaml line 4: toy.token should be a valid string, not ***",
        ]


class TestValues:
    @pytest.mark.parametrize(
        ("text", "size"),
        [
            (0, 0), (17, 17), ("17", 17), ("2GB", 2 * 10**9), ("2 gib", 2 * 2**30), ("1.5k", 1500),
            ("3MiB", 3 * 2**20), ("1T", 10**12), (" 5 B ", 5),
        ],
    )  # fmt: skip
    def test_sizes(self, text: object, size: int) -> None:
        assert parse_size(text) == size

    @pytest.mark.parametrize("text", ["", "GB", "2XB", "-1", -1, 1.5, None, True, [1], "1e9", "2GBB"])
    def test_what_is_no_size(self, text: object) -> None:
        with pytest.raises(ValueError, match="size"):
            parse_size(text)

    @pytest.mark.parametrize(
        ("host", "url"),
        [
            ("127.0.0.1", "http://127.0.0.1:8000"),
            ("0.0.0.0", "http://127.0.0.1:8000"),
            ("::", "http://[::1]:8000"),
            ("fd00::2", "http://[fd00::2]:8000"),
            ("box", "http://box:8000"),
        ],
    )
    def test_where_clients_find_the_service(self, host: str, url: str) -> None:
        assert load_config(flags={"server.host": ("--host", host)}, environ={}).server.url == url


class TestPaths:
    def place(self, **flags: Any) -> Paths:
        given = {f"orchestration.{key}": (f"--{key}", value) for key, value in flags.items()}
        return load_config(flags=given, environ={}).paths(HOME)

    def test_a_root_holds_everything(self, tmp_path: Path) -> None:
        paths = self.place(root="/srv/models")
        assert paths.repository == Path("/srv/models/repository")
        assert paths.incoming == Path("/srv/models/incoming")
        assert paths.quarantine == Path("/srv/models/quarantine")
        assert paths.trash == Path("/srv/models/trash")
        assert paths.state == Path("/srv/models/.modelium")
        assert paths.cache == Path("/home/ann/.cache/modelium")
        assert self.place().root == tmp_path / "models"

    def test_a_repository_alone_is_somebody_elses(self) -> None:
        paths = self.place(model_repository="/srv/triton")
        assert paths.repository == Path("/srv/triton")
        assert paths.incoming is None
        assert paths.root.parent == Path("/home/ann/.local/state/modelium")
        assert paths.root.name.startswith("triton-")
        assert self.place(model_repository="/other/triton").root != paths.root
        assert self.place(model_repository="/srv/triton", incoming_directory="/drop").incoming == Path("/drop")

    def test_a_repository_with_a_root_keeps_its_state_there(self) -> None:
        paths = self.place(model_repository="/srv/triton", root="/srv/m")
        assert paths.state == Path("/srv/m/.modelium")
        assert paths.incoming == Path("/srv/m/incoming")

    @pytest.mark.parametrize(
        "flags",
        [
            {"root": "/srv/m", "model_repository": "/srv/m"},
            {"root": "/srv/m/inner", "model_repository": "/srv/m"},
            {"root": "/srv/m", "incoming_directory": "/srv/m"},
            {"root": "/srv/m", "incoming_directory": "/srv/m/repository/x"},
            {"root": "/srv/m", "model_repository": "/srv/m/incoming/repo"},
            {"model_repository": "/home/ann"},
        ],
    )
    def test_folders_within_a_watched_one_are_refused(self, flags: dict[str, str]) -> None:
        with pytest.raises(ConfigError, match="where everything is taken for a model"):
            self.place(**flags)

    def test_links_do_not_hide_that(self, tmp_path: Path) -> None:
        (tmp_path / "repo").mkdir()
        (tmp_path / "root").symlink_to("repo")
        with pytest.raises(ConfigError, match="where everything is taken for a model"):
            self.place(root=str(tmp_path / "root"), model_repository=str(tmp_path / "repo"))

    def test_cache_and_state_follow_the_users_folders(self) -> None:
        assert cache_dir({"MODELIUM_CACHE_DIR": "/c", "XDG_CACHE_HOME": "/x"}) == Path("/c")
        assert cache_dir({"XDG_CACHE_HOME": "/x"}) == Path("/x/modelium")
        assert cache_dir({"XDG_CACHE_HOME": "relative", **HOME}) == Path("/home/ann/.cache/modelium")
        config = load_config(flags={"orchestration.model_repository": ("-r", "/srv/triton")}, environ={})
        assert config.paths({"XDG_STATE_HOME": "/s", **HOME}).root.parent == Path("/s/modelium")


class TestDescriptions:
    def test_the_commented_file_changes_nothing(self) -> None:
        text = commented_yaml({"toy": ToySection})
        assert yaml.safe_load(text) is None
        assert "# Whether it is used." in text

    def test_uncommented_it_says_the_defaults(self) -> None:
        lines = [line for line in commented_yaml({"toy": ToySection}).splitlines() if not re.match(r"# \S", line)]
        text = "\n".join(line.removeprefix("#") for line in lines)
        data = yaml.safe_load(text)
        assert data["toy"] == {"enabled": True, "token": "", "size": None}
        assert set(data["orchestration"]["policies"]) == set(Config().policies.model_dump())
        without_root: Any = {"orchestration": {"root"}, "toy": True}
        config = load_config(write(text), environ={})
        assert config.model_dump(exclude=without_root) == Config().model_dump(exclude=without_root)
        assert validate_sections(config, {"toy": ToySection}) == {"toy": ToySection()}

    def test_every_key_has_a_default_and_a_description(self) -> None:
        models: list[Any] = [Config]
        for model in models:
            assert model.__doc__
            for name, field in model.model_fields.items():
                assert not field.is_required(), name
                if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                    models.append(field.annotation)
                else:
                    assert field.description, f"{model.__name__}.{name}"

    def test_the_schema_knows_all_sections_and_refuses_others(self) -> None:
        described = schema({"toy": ToySection})
        assert described["additionalProperties"] is False
        assert set(described["properties"]) == {*Config.model_fields, "toy"}
        assert described["$defs"]["ToySection"]["properties"]["token"]["description"] == "What it logs in with."
        for key, section in described["properties"].items():
            if key == "runtimes":
                continue  # no section of its own, but one for each name
            name = section["$ref"].removeprefix("#/$defs/")
            assert name in described["$defs"]
        assert json.loads(schema_text({})) == schema({})


class TestNamedRuntimes:
    def test_each_is_validated_by_its_backend(self) -> None:
        config = Config.model_validate({"runtimes": {"second": {"backend": "toy", "token": "x"}}})
        sections = validate_sections(config, {"toy": ToySection})
        assert sections["second"] == ToySection(token="x")
        assert sections["toy"] == ToySection()

    @pytest.mark.parametrize(
        "runtimes, told",
        [
            ({"a": {"backend": "toi"}}, "runtimes.a.backend: there is no runtime backend 'toi': did you mean 'toy'?"),
            ({"toy": {"backend": "toy"}}, "runtimes.toy: toy is a section of its own already"),
            ({"a": {"backend": "toy", "tokn": 1}}, "runtimes.a.tokn"),
        ],
    )
    def test_what_is_wrong_is_told_by_its_key(self, runtimes: dict[str, Any], told: str) -> None:
        config = Config.model_validate({"runtimes": runtimes})
        with pytest.raises(ConfigError) as caught:
            validate_sections(config, {"toy": ToySection})
        assert told in caught.value.message

    @pytest.mark.parametrize("name", ["", "a b", "-a", "a/b", "x" * 40])
    def test_names_are_parts_of_paths(self, name: str) -> None:
        with pytest.raises(ValueError):
            Config.model_validate({"runtimes": {name: {"backend": "toy"}}})
