"""Releases that carry a program: flynn-host as it is here, installed by pip as if it were another one."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

from tests.publisher import Publisher


class Maker(Publisher):
    """Releases programs that are this one, by way of its environment: the wheels need not carry all the libraries."""

    def program(self, version: str, *, broken: str = "") -> None:
        wheels = self.home / f"wheels-{version}"
        wheels.mkdir()
        main = f"import site; site.addsitedir({str(_site_packages())!r})\n"
        main += f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        main += "def flynn_host():\n"
        main += f"    {broken or 'pass'}\n"
        main += "    from flynn.host.main import main\n    main()\n"
        main += "def flynn():\n    from flynn.cli.main import main\n    main()\n"
        info = f"flynn-{version[1:]}.dist-info"
        with zipfile.ZipFile(wheels / f"flynn-{version[1:]}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("of_the_release.py", main)
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: flynn\nVersion: {version[1:]}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            commands = "flynn-host = of_the_release:flynn_host\nflynn = of_the_release:flynn\n"
            wheel.writestr(f"{info}/entry_points.txt", f"[console_scripts]\n{commands}")
            wheel.writestr(f"{info}/RECORD", "")
        self.release(version, wheels=wheels)


def _site_packages() -> Path:
    return next(Path(entry) for entry in sys.path if entry.endswith("site-packages"))
