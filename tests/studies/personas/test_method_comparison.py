"""The rows of all methods are written anew, but never over a run of another command."""

from __future__ import annotations

import pytest

from persona_lora.core.errors import UserError
from persona_lora.core.runs import Output, Run
from persona_lora.studies.personas.method_comparison import COMMAND, whole_of


@pytest.mark.parametrize("command", ["sweep", COMMAND])
@pytest.mark.parametrize("overwrite", [False, True])
def test_only_rows_of_this_command_are_written_anew(tmp_path, command, overwrite):
    place = tmp_path / "comparison"
    Run.open(place, command=command, config={}, seed=0)
    if command != COMMAND and not overwrite:
        with pytest.raises(UserError, match=r"comparison holds a run of sweep; .* --overwrite"):
            whole_of(Output(tmp_path))
    else:
        assert whole_of(Output(tmp_path, overwrite)) == Output(place, overwrite=True)
