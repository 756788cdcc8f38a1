"""``workbench profile report``: a recording as one page: findings, timelines with phases, shares, bytes and joules.

workbench profile report recording=runs/train-sft/latest against=runs/train-sft/20261120T101500
"""

import dataclasses

from pydantic import Field

from profiling.comparison import add_comparison
from profiling.page import add_pages, summarize
from profiling.trace import Recording, read_phases, read_recording, samples_folder
from workbench.config import Config, InputPath
from workbench.runs import Run, Summary


class ReportConfig(Config):
    """What to draw."""

    recording: InputPath = Field(description="run folder of a 'profile record', or of any command run with --profile")
    phases: InputPath | None = Field(None, description="more bands: JSON lines of name, start, end (epoch seconds)")
    against: InputPath | None = Field(None, description="an earlier recording to compare with")


def run(config: ReportConfig, run: Run) -> Summary:
    """Draw the recording; the summary holds its extent, loads, bytes and findings."""
    recording = read_recording(config.recording)
    run.input("recording", samples_folder(config.recording))
    if config.phases is not None:
        run.input("phases", config.phases)
        recording = _with_phases(recording, config)
    run.say(f"drawing {len(recording.hosts)} hosts, {len(recording.phases)} phases, {len(recording.marks)} marks")
    add_pages(run.report, recording)
    if config.against is not None:
        run.input("against", samples_folder(config.against))
        add_comparison(run.report, recording, read_recording(config.against))
    return summarize(recording)


def _with_phases(recording: Recording, config: ReportConfig) -> Recording:
    assert config.phases is not None
    phases = sorted([*recording.phases, *read_phases(config.phases)], key=lambda phase: (phase.start, -phase.end))
    return dataclasses.replace(recording, phases=phases)
