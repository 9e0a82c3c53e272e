import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_generated_pages_follow_the_code():
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "docs.py"), "--check"], capture_output=True, text=True)
    assert done.stdout == "pages are current\n" and done.returncode == 0, done.stdout + done.stderr


def test_readme_names_every_module():
    readme = (ROOT / "README.md").read_text()
    missing = [path.name for path in (ROOT / "diagnostics").glob("*.py") if not path.name.startswith("__") and f"  {path.name}" not in readme]
    assert missing == []


def test_readme_shows_the_commands():
    readme = (ROOT / "README.md").read_text()
    assert all(f"make {target}" in readme for target in ("demo", "test", "real"))
