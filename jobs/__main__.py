"""The installed command: ``pspnet JOB [flags]`` is ``jobs/JOB.py [flags]``, from any folder."""

import runpy
import sys
from pathlib import Path

JOBS = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem != "cli")


def main() -> None:
    """Run the job that the first argument names, with the others as its flags; it ends the process."""
    job = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if job in JOBS:
        runpy.run_module(f"jobs.{job}", run_name="__main__", alter_sys=True)
    elif job in ("-h", "--help"):
        print(f"pspnet JOB [flags], where JOB is one of {', '.join(JOBS)}; pspnet JOB --help lists its flags")
    else:
        print(f"error: job={job}: choose one of {', '.join(JOBS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
