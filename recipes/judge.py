"""Which policy is good, without a simulator: `python recipes/judge.py 'checkpoints=[RUN, FILE]' output=FOLDER`."""

from __future__ import annotations

from pathlib import Path

from iql_torchrl.configuration.command_line import recipe
from iql_torchrl.running.options import JudgeOptions


@recipe("judge", JudgeOptions)
def main(options: JudgeOptions) -> None:
    """Judge the policies, write table and picture, print the table and what the doctor says of their runs."""
    from iql_torchrl.judging.judgement import judge_checkpoints
    from iql_torchrl.judging.writing import as_text, check_output, write_judgement

    folder = check_output(Path(options.output).expanduser())
    judgement = judge_checkpoints(options)
    print(as_text(judgement))
    print(f"wrote {', '.join(map(str, write_judgement(judgement, folder)))}")


if __name__ == "__main__":
    main()
