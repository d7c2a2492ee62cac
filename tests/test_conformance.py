"""The conformance kit: our process passes, so does one that shares no code with it, and every case can fail.

`BREAKAGES` is the proof that a case sees what it is for: other_peer.py, broken in one place, fails just those cases.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mossnano_stdio.errors import ExitStatus
from mossnano_stdio.tools.conformance.table import CASES, Case, Status, Verdict, try_cases
from tests.child import DEMO, PROCESS, ROOT, double
from tests.conftest import skip_if_nothing_can_be_built
from tests.tool import Outcome, call_tool

OTHER_PEER = [sys.executable, "-I", "-S", str(Path(__file__).with_name("other_peer.py"))]
CASE_NAMED = {case.name: case for case in CASES}
NOT_FOR_THE_DEMO = {
    "tokens-with-a-code-out-of-range-are-bad",
    "tokens-with-bits-in-the-padding-are-bad",
    "artifacts-with-a-code-out-of-range-are-bad",
    "artifacts-with-bits-in-the-padding-are-bad",
}

OF_THE_FIRST_CHUNK = [
    "framing-lost-after-a-stream",
    "tokens-lone-frame-is-answered",
    "tokens-ramp-up",
    "tokens-before-bad-ones-are-heard",
    "pings-come-after-the-audio-before-them",
    "artifacts-inside-a-token-stream-are-out-of-place",
    "cancelling-drops-an-open-stream",
    "cancelling-keeps-pings-and-settings",
    "settings-fix-the-chunk",
    "settings-give-the-ramp-back",
    "numbered-get-what-was-granted",
    "numbered-are-bounded-alone",
]

NOT_FOR_WINDOWS = {"endings-by-sigterm", "endings-by-sigint"} if sys.platform == "win32" else set()  # no signals

# What is broken in other_peer.py: the cases that fail.
BREAKAGES = {
    "HANDSHAKE does not say the threads": ["handshakes-has-every-key"],
    "it calls itself protocol 2": ["handshakes-agrees-with-itself"],
    "a HANDSHAKE has no keys of its own": ["handshakes-that-fits-is-taken-in-silence"],
    "a HANDSHAKE that does not fit is forgotten": ["handshakes-that-does-not-fit-closes-token-streams"],
    "a HANDSHAKE needs no JSON": ["handshakes-without-json-is-a-bad-payload"],
    "a HANDSHAKE in a stream is compared": ["handshakes-inside-a-stream-is-out-of-place"],
    "artifacts are frame-major": [
        "handshakes-inside-a-stream-is-out-of-place",
        "framing-unknown-kinds-in-a-stream",
        "tokens-inside-an-artifact-are-out-of-place",
        "artifacts-sound-like-their-tokens",
        "artifacts-may-be-split-over-messages",
        "artifacts-are-trimmed",
        "artifacts-after-bad-ones-are-new",
        "settings-inside-a-stream-are-out-of-place",
    ],
    "loses messages that come in more than three reads": ["framing-byte-by-byte"],
    "loses the 64th message of one read": ["framing-many-messages-at-once"],
    "waits for a quiet input": ["framing-answers-before-more-input-comes"],
    "the longest message is too long": ["framing-longest-message"],
    "no length is too large": ["framing-length-above-the-longest"],
    "a length of 0 is nothing": ["framing-length-zero"],
    "framing that is lost drops what came before": ["framing-lost-after-a-stream"],
    "PING overtakes audio": [
        "framing-lost-after-a-stream",
        "pings-come-after-the-audio-before-them",
        "pings-come-after-the-end-before-them",
        "endings-behind-streams-that-wait",
    ],
    "unknown kinds between streams are passed over": [
        "framing-unknown-kinds-between-streams",
        "errors-say-what-they-must",
    ],
    "unknown kinds end a stream": ["framing-unknown-kinds-in-a-stream"],
    "three first frames wait, it says": ["tokens-lone-frame-is-answered", "tokens-ramp-up"],
    "a lone frame waits for a second": ["tokens-lone-frame-is-answered", "settings-give-the-ramp-back"],
    "an empty AUDIO before END": ["tokens-come-back-as-whole-frames"],
    "chunks begin with 4": ["tokens-ramp-up", "cancelling-drops-an-open-stream"],
    "chunks do not grow": ["tokens-ramp-up"],
    "chunks grow once": ["tokens-ramp-up"],
    "forgets everything between messages": [
        "tokens-may-be-split-over-messages",
        "artifacts-inside-a-token-stream-are-out-of-place",
    ],
    "silence, whatever the codes": ["tokens-are-what-is-heard"],
    "empty TOKENS open nothing": ["tokens-that-are-empty-open-a-stream", "streams-are-numbered-from-0"],
    "a byte after two frames is dropped": ["tokens-with-part-of-a-frame-are-bad"],
    "TOKENS may hold any code": ["tokens-with-a-code-out-of-range-are-bad"],
    "TOKENS may have bits in the padding": ["tokens-with-bits-in-the-padding-are-bad"],
    "bad TOKENS are forgotten": ["tokens-after-bad-ones-are-skipped"],
    "bad TOKENS void what came before": ["tokens-before-bad-ones-are-heard"],
    "TOKENS end an artifact": ["tokens-inside-an-artifact-are-out-of-place"],
    "END counts frames from 1": ["streams-end-counts-what-was-sent"],
    "a bad artifact takes no number": ["streams-are-numbered-from-0"],
    "a stream of nine frames leaves a trace": ["streams-leave-no-trace-in-the-next"],
    "END is forgotten when TOKENS wait": ["streams-may-be-sent-ahead"],
    "a second END is ignored": ["streams-end-without-one-is-refused"],
    "END must be empty": ["streams-end-may-hold-json"],
    "an empty PING is not echoed": ["pings-are-echoed"],
    "PING overtakes END": ["pings-come-after-the-end-before-them", "endings-behind-streams-that-wait"],
    "PING is dropped in a bad stream": ["pings-are-echoed-in-every-state"],
    "an empty ARTIFACT ends it": ["artifacts-may-be-split-over-messages"],
    "artifacts are not trimmed": ["artifacts-are-trimmed"],
    "an artifact of no frames waits for more": ["artifacts-of-no-frames-end-at-once"],
    "bytes after an artifact are dropped": ["artifacts-with-bytes-after-their-end-are-bad"],
    "any eight bytes begin an artifact": ["artifacts-that-do-not-begin-as-such-are-bad"],
    "any sample rate will do": ["artifacts-of-other-makes-are-bad"],
    "original_samples are not checked": ["artifacts-longer-than-their-frames-are-bad"],
    "an artifact may hold any code": ["artifacts-with-a-code-out-of-range-are-bad"],
    "an artifact may have bits in the padding": ["artifacts-with-bits-in-the-padding-are-bad"],
    "END cuts an artifact in silence": ["artifacts-that-are-cut-by-end-are-bad"],
    "a bad stream is skipped until END": ["artifacts-after-bad-ones-are-new"],
    "ARTIFACT ends a token stream": ["artifacts-inside-a-token-stream-are-out-of-place"],
    "chunk_frames is a maximum": [
        "artifacts-inside-a-token-stream-are-out-of-place",
        "settings-fix-the-chunk",
        "settings-stay-for-later-streams",
    ],
    "ERROR has nothing to say to people": ["errors-say-what-they-must"],
    "a peer's ERROR is ignored": ["errors-of-peers-are-reported"],
    "CANCEL between streams drops stream 0": ["cancelling-between-streams"],
    "CANCEL echoes ASCII": ["cancelling-echoes-its-payload"],
    "CANCELs that wait get one END": ["cancelling-is-answered-each-time"],
    "a dropped stream gets an END too": [
        "cancelling-is-answered-each-time",
        "cancelling-drops-an-open-stream",
        "cancelling-stops-the-sound",
        "cancelling-overtakes-what-waits",
        "cancelling-keeps-pings-and-settings",
        "cancelling-inside-an-artifact",
        "cancelling-inside-a-bad-stream",
        "cancelling-is-not-answered-by-the-stream",
        "settings-stay-for-later-streams",
        "endings-after-a-cancel",
    ],
    "CANCEL keeps the decoder's state": ["cancelling-drops-an-open-stream", "cancelling-overtakes-what-waits"],
    "stale audio after the END of CANCEL": [
        "cancelling-drops-an-open-stream",
        "cancelling-stops-the-sound",
        "cancelling-overtakes-what-waits",
        "cancelling-keeps-pings-and-settings",
        "cancelling-inside-an-artifact",
        "cancelling-inside-a-bad-stream",
        "cancelling-is-not-answered-by-the-stream",
        "settings-stay-for-later-streams",
        "endings-after-a-cancel",
    ],
    "decodes ahead of the reader": ["cancelling-stops-the-sound", "cancelling-overtakes-what-waits"],
    "CANCEL waits its turn": [
        "cancelling-stops-the-sound",
        "cancelling-overtakes-what-waits",
        "cancelling-keeps-pings-and-settings",
    ],
    "CANCEL drops the open stream only": ["cancelling-overtakes-what-waits", "cancelling-keeps-pings-and-settings"],
    "CANCEL drops PINGs": ["cancelling-keeps-pings-and-settings"],
    "CANCEL drops SETTINGS": ["cancelling-keeps-pings-and-settings"],
    "CANCEL leaves off in an artifact": ["cancelling-inside-an-artifact"],
    "CANCEL leaves off skipping": ["cancelling-inside-a-bad-stream"],
    "chunk_frames null changes nothing": ["settings-give-the-ramp-back"],
    "CANCEL takes settings back": ["settings-stay-for-later-streams"],
    "SETTINGS without keys take all back": ["settings-without-keys-change-nothing"],
    "chunk_frames may be 1001": ["settings-with-bad-values-change-nothing"],
    "the good half of bad SETTINGS is taken": [
        "settings-with-bad-values-change-nothing",
        "settings-with-unknown-keys-change-nothing",
    ],
    "unknown SETTINGS are ignored": ["settings-with-unknown-keys-change-nothing"],
    "SETTINGS need no JSON": ["settings-without-json-are-a-bad-payload"],
    "frame_bytes stays as it was": ["settings-choose-the-quantizers"],
    "SETTINGS take effect inside a stream": ["settings-inside-a-stream-are-out-of-place"],
    "ends with 1 when all is well": [
        "endings-between-streams",
        "endings-in-a-token-stream",
        "endings-behind-streams-that-wait",
        "endings-in-a-bad-stream",
        "endings-after-a-cancel",
    ],
    "the end of input drops the open stream": ["endings-in-a-token-stream"],
    "ends with 65 after any ERROR": ["endings-in-a-bad-stream"],
    "a cut message goes unnoticed": ["endings-inside-a-message", "endings-inside-a-message-of-a-stream"],
    "a cut drops the open stream": ["endings-inside-a-message-of-a-stream"],
    "a cut artifact goes unnoticed": ["endings-inside-an-artifact"],
    "a last word on stdout": ["endings-with-nothing-but-messages-on-stdout"],
    "ends with 1 when nobody reads": ["endings-when-nobody-reads"],
    "SIGTERM kills": ["endings-by-sigterm"],
    "SIGINT kills": ["endings-by-sigint"],
}

# The other peer has no numbered streams; here our own process is broken, in broken_process.py.
BREAKAGES_OF_NUMBERED = {
    "all streams have one state": ["numbered-sound-like-plain-ones"],
    "END has the next number": ["numbered-end-with-their-number", "numbered-are-cancelled-alone"],
    "late input is dropped in silence": ["numbered-are-never-opened-again"],
    "END and CREDIT may open a stream": ["numbered-are-opened-by-input-only"],
    "one stream too many is dropped in silence": ["numbered-are-as-many-as-was-said"],
    "CANCEL of a stream is not echoed": ["numbered-are-cancelled-alone"],
    "credit is ignored": ["numbered-get-what-was-granted"],
    "any window will do": ["numbered-refuse-windows-that-never-move"],
    "a stream has no bound": ["numbered-are-bounded-alone"],
    "a MARK is a sample late": ["numbered-carry-marks-to-their-samples"],
    "levels are never told": ["numbered-have-a-form-of-their-own"],
    "urgency may be 8": ["numbered-have-urgency-from-0-to-7"],
}
NUMBERED_CASES = [case for case in CASES if case.name.startswith("numbered-")]


def try_on(command: Sequence[str], cases: Sequence[Case] = CASES, case_seconds: float = 20) -> list[Verdict]:
    return list(try_cases(cases, command, start_seconds=60, case_seconds=case_seconds, jobs=2))


def failed(verdicts: Sequence[Verdict]) -> set[str]:
    return {verdict.case.name for verdict in verdicts if verdict.status is Status.FAILED}


def what_went_wrong(verdicts: Sequence[Verdict]) -> list[str]:
    return [f"{verdict.case.name}: {verdict.expected}, not {verdict.seen}" for verdict in verdicts if verdict.expected]


# --- who passes ------------------------------------------------------------------------------------


def test_our_process_passes_with_the_demo() -> None:
    verdicts = try_on(DEMO)
    assert what_went_wrong(verdicts) == []
    assert {verdict.case.name for verdict in verdicts if verdict.status is Status.NOT_APPLICABLE} == {
        *NOT_FOR_THE_DEMO,
        *NOT_FOR_WINDOWS,
    }


def test_our_process_passes_where_some_codes_are_out_of_range() -> None:
    cases = [CASE_NAMED[name] for name in sorted(NOT_FOR_THE_DEMO) if "range" in name]
    assert [verdict.status for verdict in try_on(double(), cases)] == [Status.PASSED] * 2


def test_our_process_passes_with_fixed_chunks() -> None:
    rooms = ("tokens", "pings", "cancelling", "settings", "endings-in")
    cases = [case for case in CASES if case.name.startswith(rooms)]
    assert what_went_wrong(try_on(double({}, "--chunk-frames", "4"), cases)) == []


@pytest.mark.parametrize("second_frames", [4, 8])
def test_our_process_passes_with_the_ramp_of_large_weights(second_frames: int) -> None:
    names = ["tokens-ramp-up", "cancelling-drops-an-open-stream", "settings-give-the-ramp-back"]
    command = double({"ramp_second_frames": second_frames})
    assert what_went_wrong(try_on(command, [CASE_NAMED[name] for name in names])) == []


def test_our_process_passes_with_a_codec_whose_first_frames_wait(tmp_path: Path) -> None:
    skip_if_nothing_can_be_built()
    from mossnano_stdio.build.bundle import build_standin

    build_standin(tmp_path, "tiny", 0, model="encodec-24k", trial=False)
    cases = [CASE_NAMED[name] for name in OF_THE_FIRST_CHUNK]
    verdicts = try_on([*PROCESS, "--weights", str(tmp_path)], cases)
    assert [verdict.status for verdict in verdicts] == [Status.PASSED] * len(cases), what_went_wrong(verdicts)


def test_codes_alone_are_not_tried_where_segments_are_decoded(encodec48_bundle: Path) -> None:
    names = ("tokens-that-are-empty-open-a-stream", "tokens-lone-frame-is-answered", "pings-are-echoed")
    verdicts = try_on([*PROCESS, "--weights", str(encodec48_bundle)], [CASE_NAMED[name] for name in names])
    assert [verdict.status for verdict in verdicts] == [Status.NOT_APPLICABLE] * 2 + [Status.PASSED]
    assert verdicts[0].seen.startswith("it decodes segments")


def test_our_process_passes_where_messages_may_be_longer_than_answers() -> None:
    (verdict,) = try_on(double({}, "--max-message-bytes", "2000000"), [CASE_NAMED["framing-longest-message"]])
    assert (verdict.status, verdict.seen) == (Status.PASSED, "")


def test_an_implementation_that_shares_nothing_with_ours_passes_in_every_case() -> None:
    verdicts = try_on(OTHER_PEER)
    assert what_went_wrong(verdicts) == []
    numbered = {case.name for case in NUMBERED_CASES}
    assert {verdict.case.name for verdict in verdicts if verdict.status is not Status.PASSED} == {
        *NOT_FOR_WINDOWS,
        *numbered,
    }
    said = {verdict.seen for verdict in verdicts if verdict.case.name in numbered}
    assert said == {"it does not offer numbered streams: its HANDSHAKE has no max_streams"}


# --- who fails -------------------------------------------------------------------------------------


def test_every_case_is_broken_by_something() -> None:
    breakages = [*BREAKAGES.values(), *BREAKAGES_OF_NUMBERED.values()]
    assert {name for names in breakages for name in names} == CASE_NAMED.keys()


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_what_is_broken_fails_its_cases(breakage: str) -> None:
    cases = [CASE_NAMED[name] for name in BREAKAGES[breakage]]
    assert failed(try_on([*OTHER_PEER, breakage], cases, case_seconds=1)) == set(BREAKAGES[breakage]) - NOT_FOR_WINDOWS


@pytest.mark.parametrize("breakage", BREAKAGES_OF_NUMBERED)
def test_what_is_broken_of_numbered_streams_fails_its_cases_and_no_others(breakage: str) -> None:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.broken_process import main; main()"
    command = [sys.executable, "-c", program, breakage, "--max-streams", "4"]
    assert failed(try_on(command, NUMBERED_CASES, case_seconds=4)) == set(BREAKAGES_OF_NUMBERED[breakage])


@pytest.mark.slow
@pytest.mark.parametrize("breakage", BREAKAGES)
def test_what_is_broken_fails_no_other_cases(breakage: str) -> None:
    assert failed(try_on([*OTHER_PEER, breakage], case_seconds=4)) == set(BREAKAGES[breakage]) - NOT_FOR_WINDOWS


def test_a_verdict_says_what_was_expected_and_what_was_seen() -> None:
    (verdict,) = try_on([*OTHER_PEER, "END must be empty"], [CASE_NAMED["streams-end-may-hold-json"]])
    assert verdict.expected == "END of a stream with cancelled false, samples 10"
    assert verdict.seen.startswith('ERROR {"code": "bad_payload", "message": "END must be empty"')


def test_who_does_not_answer_is_killed() -> None:
    (verdict,) = try_on([*OTHER_PEER, "no length is too large"], [CASE_NAMED["framing-length-above-the-longest"]], 0.5)
    assert (verdict.expected, verdict.seen) == ("a fatal ERROR framing_lost", "nothing more within 0.5 s")
    assert verdict.seconds < 5


def test_who_says_no_handshake_is_asked_nothing_more() -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    (verdict,) = try_cases(CASES, sleeper, start_seconds=0.5, case_seconds=1, jobs=2)
    assert (verdict.expected, verdict.seen) == ("HANDSHAKE as the first message", "nothing more within 0.5 s")
    crier = [sys.executable, "-c", "import sys; sys.exit('no weights')"]
    (verdict,) = try_on(crier)
    assert verdict.seen == "the end of the output, status 1, stderr: no weights"


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ("while True: print('y')", "messages on stdout and nothing else"),
        ("print('\\x0b\\0\\0\\0\\0no object!', end='', flush=True); input()", "HANDSHAKE with a JSON object"),
        (
            "print('\\x03\\0\\0\\0\\0{}', end='', flush=True); input()",
            "a HANDSHAKE whose sample_rate is a number above 0",
        ),
    ],
    ids=["no messages", "no JSON", "no numbers"],
)
def test_who_says_no_handshake_of_use_is_asked_nothing_more(says: str, expected: str) -> None:
    """Or the same failure would come once for each case."""
    (verdict,) = try_on([sys.executable, "-c", says])
    assert verdict.expected == expected


def test_what_a_child_starts_ends_with_it(tmp_path: Path) -> None:
    """Or it would keep the pipe open, and we would read for as long as it lives."""
    started = tmp_path / "started"
    grandchild = f"import pathlib, time; pathlib.Path({str(started)!r}).touch(); time.sleep(60)"
    # On Windows it has the pipe only where it is given.
    spawner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}], stdout=sys.stdout)"
    for start_seconds in (1, 4, 16):  # until it has been long enough for both to start
        command = [sys.executable, "-c", spawner]
        (verdict,) = try_cases(CASES, command, start_seconds=start_seconds, case_seconds=1, jobs=1)
        if started.exists():
            break
    assert started.exists()
    assert verdict.seconds < start_seconds + 20


# --- the tool --------------------------------------------------------------------------------------


def conformance(*arguments: str) -> Outcome:
    return call_tool("conformance", *arguments)


def test_the_tool_lists_the_cases() -> None:
    text = conformance("--list").out.decode()
    for case in CASES:
        assert f"{case.name}\n  {case.promise}\n" in text
    listed = [json.loads(line) for line in conformance("--list", "--json").out.splitlines()]
    assert listed == [{"name": case.name, "promise": case.promise} for case in CASES]


def test_the_tool_says_pass_or_fail() -> None:
    names = ("streams-may-be-sent-ahead", "streams-end-may-hold-json")
    chosen = [word for name in names for word in ("--case", name)]
    outcome = conformance(*chosen, "--", *OTHER_PEER, "END must be empty")
    assert outcome.status == ExitStatus.CHECK_FAILED
    lines = outcome.out.decode().splitlines()
    assert lines[:2] == ["pass  streams-may-be-sent-ahead", "FAIL  streams-end-may-hold-json"]
    assert [line.split()[0] for line in lines[2:5]] == ["promise", "expected", "seen"]
    assert lines[5] == "1 passed, 1 failed, 0 not applicable"
    assert conformance(*chosen, "--", *OTHER_PEER).status == ExitStatus.DONE


def test_the_tool_speaks_json() -> None:
    outcome = conformance("--json", "--case", "streams-end-may-hold-json", "--", *OTHER_PEER, "END must be empty")
    (line,) = outcome.out.splitlines()
    fields = json.loads(line)
    assert (fields["name"], fields["status"]) == ("streams-end-may-hold-json", "failed")
    assert fields["expected"] and fields["seen"] and fields["seconds"] > 0


def test_the_tool_says_why_a_case_is_not_applicable() -> None:
    outcome = conformance("--case", "tokens-with-bits-in-the-padding-are-bad", "--", *double())
    assert outcome.out.decode().splitlines() == [
        "n/a  tokens-with-bits-in-the-padding-are-bad  (a frame has no padding)",
        "0 passed, 0 failed, 1 not applicable",
    ]
    assert outcome.status == ExitStatus.DONE


def sleeper_before(seconds: float, *command: str) -> list[str]:
    """A child that lets us wait, then is as good as another."""
    program = f"import subprocess, sys, time; time.sleep({seconds}); sys.exit(subprocess.run({command}).returncode)"
    return [sys.executable, "-c", program]


def test_the_tool_says_that_it_waits_for_the_handshake_and_tries_one_case_only() -> None:
    outcome = conformance("--start-timeout", "3.5", "--", *sleeper_before(60, *OTHER_PEER))
    assert outcome.status == ExitStatus.CHECK_FAILED
    assert outcome.error_line == "waiting for the HANDSHAKE, 1.5 s more at the most (--start-timeout)"
    lines = outcome.out.decode().splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["FAIL", "promise", "expected", "seen"]
    assert lines[-1] == f"0 passed, 1 failed, 0 not applicable, {len(CASES) - 1} not tried"


def test_the_tool_is_patient_with_who_starts_slowly_and_says_so_once() -> None:
    names = ("streams-may-be-sent-ahead", "streams-end-may-hold-json")
    chosen = [word for name in names for word in ("--case", name)]
    outcome = conformance(*chosen, "--", *sleeper_before(2.5, *OTHER_PEER))
    assert outcome.out.decode().splitlines()[-1] == "2 passed, 0 failed, 0 not applicable"
    assert outcome.error_line == "waiting for the HANDSHAKE, 58 s more at the most (--start-timeout)"


def test_the_tool_does_not_wait_for_a_handshake_that_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the case takes then."""
    monkeypatch.setattr("mossnano_stdio.tools.conformance.table.QUIET_SECONDS", 3.0)
    broken = [*OTHER_PEER, "no length is too large"]
    outcome = conformance("--case", "framing-length-above-the-longest", "--timeout", "4", "--", *broken)
    assert (outcome.status, outcome.err) == (ExitStatus.CHECK_FAILED, "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "there is no COMMAND"),
        (["--case", "nonsense", "--", sys.executable], "there is no case 'nonsense'"),
        (["--", "/nowhere/to/be/found"], "/nowhere/to/be/found cannot be started"),
    ],
)
def test_the_tool_refuses_what_makes_no_sense(arguments: list[str], says: str) -> None:
    outcome = conformance(*arguments)
    assert outcome.status == ExitStatus.USAGE
    assert says in outcome.error_line


@pytest.mark.parametrize("arguments", [["--timeout", "0"], ["--timeout", "soon"], ["--jobs", "0"], ["--jobs", "x"]])
def test_the_tool_refuses_numbers_that_make_no_sense(arguments: list[str]) -> None:
    assert conformance(*arguments, "--", sys.executable).status == ExitStatus.USAGE


def test_the_cases_are_held_against_the_document() -> None:
    """Every code of the table of errors is expected by some case, but for those of bad luck and of the encoder."""
    document = (ROOT / "protocol.md").read_text("utf-8")
    table = document.split("### 0x05 ERROR")[1].split("### 0x06")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    codes = {code.strip(" `") for row in rows for code in row.split(",")}
    tried = "".join(path.read_text("utf-8") for path in (ROOT / "mossnano_stdio/tools/conformance/cases").glob("*.py"))
    assert {code for code in codes if f'"{code}"' not in tried} == {
        "decode_failed", "not_finite", "bad_weights", "no_device", "out_of_memory", "bug", "bad_audio",
    }  # fmt: skip
