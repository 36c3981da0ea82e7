"""What the entry point names: the data path `haproxy`."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel

from modelium.api import hookimpl
from modelium.api.datapath import DataPath, DataPathContext, DataPathDriver
from modelium.errors import ConfigError
from modelium_plugin_haproxy.locate import find_executable
from modelium_plugin_haproxy.settings import HAProxySettings

MODELIUM_HOOKSPEC_VERSION = (1, 1)


class HAProxyDataPath:
    """HAProxy in front of the service and of all runtimes."""

    name = "haproxy"
    settings_model: type[BaseModel] = HAProxySettings

    def usable(self, settings: BaseModel) -> str | None:
        assert isinstance(settings, HAProxySettings)
        try:
            find_executable(settings)
        except ConfigError as error:
            return error.message
        return None

    def create(self, context: DataPathContext) -> DataPathDriver:
        from modelium_plugin_haproxy.driver import HAProxyDriver

        return HAProxyDriver(context)


@hookimpl
def modelium_data_paths() -> Iterable[DataPath]:
    return [HAProxyDataPath()]
