"""Lets every Hydra application of the environment use our groups: ``defaults: - ppdl/selection: ...``."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class LightningPPDLSearchPath(SearchPathPlugin):
    """Appends our ``conf/`` to the search path. Must stay cheap: Hydra runs it for every application."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        # Our own commands start inside conf/ppdl; a second way to the same groups would only clutter
        # their help.
        if any(element.path == "pkg://lightning_ppdl.conf.ppdl" for element in search_path.get_path()):
            return
        search_path.append(provider="lightning_ppdl", path="pkg://lightning_ppdl.conf")
