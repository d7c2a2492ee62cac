class_name Mossnano
extends RefCounted
## A voice for Godot 4.3 and later: starts `mossnano-stdio`, feeds it codec tokens, hands out PCM.
##
## One file, no dependency:
## [codeblock]
## var voice := Mossnano.new()
## voice.ready_to_feed.connect(func(): voice.feed(packed_frames); voice.finish())
## voice.failed.connect(func(code, message, fatal): push_error(message))
## voice.start("mossnano-stdio", [])
## # in _process: fill an AudioStreamGeneratorPlayback with it, see example.gd
## playback.push_buffer(voice.pull(playback.get_frames_available()))
## [/codeblock]
## [method start] returns at once; [signal ready_to_feed] follows when the weights are loaded. Call [method stop] before
## you let go of it, and make a new one to start anew. Threads of ours read what the process says, read its stderr, and
## write to it. When `buffer_seconds` of PCM wait the first one waits for room, and so does the process. No call waits
## for the process, not even for one that hangs: what its pipe has no room for waits here, up to 4 MiB (hours), past
## which [method feed] refuses. GDScript has no atomics, so what the threads share is behind one mutex, which nobody
## holds while he waits. Signals are emitted on the main thread.
##
## What is cut off, by [method cancel] or by an underrun, fades out over `fade_ms`, and what follows fades in; 0 leaves
## every sample as it came. With `prebuffer_ms` a stream sounds once so much of it waits, or all of it, and so again
## after an underrun: fed in real time, with jitter, 100 to 200 are enough. Set both before [method start].
##
## `state` says how far the start is, `played` how much was heard of which stream, for barge-in; streams count from 0,
## and `stream` is the last one that [method feed] opened. With `restart` a process that crashes is started again, up to
## so many times in a row (a stream that comes to its end ends the row), and [signal ready_to_feed] is emitted anew.
##
## Many voices of one process, at once: [method open] gives a [Voice] for each utterance. The process decodes ahead only
## what a voice has room for, so one that nobody pulls stops none of the others, but for the stream of this class itself,
## which has no such limit: pull it, or feed voices alone.
## [codeblock]
## var line := voice.open()
## line.marked.connect(func(text, sample): wave())   # when it is played, not when it is decoded
## line.feed(packed_frames); line.mark("wave"); line.feed(more_frames); line.finish()
## # in _process: as above, with line.pull; and to be silent at once:
## var heard_samples := line.cancel()
## [/codeblock]
##
## Godot up to 4.5.1 on Linux and macOS dies of SIGPIPE when it writes to a process that ends at that moment, as one
## does that hangs with a full pipe and is stopped (Godot's issue 111110, mended in 4.5.2). Nothing here can prevent it.
##
## NOT RUN in Godot by our checks, on any system: there its text is made Python, and run against the real process with
## stand-ins for what it asks of the engine; that finds wrong logic, but not what only Godot would refuse. Not for the
## web, Android and iOS, which start no processes. Protocol version 1, see protocol.md.

signal ready_to_feed
signal failed(code: String, message: String, fatal: bool)
signal lost(streams: PackedInt32Array)  ## Fed to a process that ended. What it had said of them is still heard.
signal log_line(line: String)  ## Of the process' stderr. Printed where nothing is connected.

enum State { STARTING, READY, FAILED, STOPPED }
enum Kind {
	HANDSHAKE = 0, AUDIO = 1, TOKENS = 4, ERROR = 5, END = 7, CANCEL = 8, SETTINGS = 9, CREDIT = 10, MARK = 11
}
enum Whose { ALL = -2, PLAIN = -1 }  ## Messages of any, or of no, numbered stream.

const LONGEST := 1 << 20  ## No message of the process is longer.
const HEAD_BYTES := 5  ## Of a message: its length and its kind.
const WAITING_BYTES := 4 << 20  ## Of messages that may wait here for the process.
const PIECE_BYTES := 4096  ## Of what is fed in one message: what a pipe takes in one go.
const NUMBERED := 0x80  ## Added to a kind: the payload begins with the number of its stream, 4 bytes.
const MOST_MARKS := 128  ## Of a voice, that were not played, and
const VOICE_BYTES := 3 << 18  ## of frames without sound yet: together less than the 1 MiB that may wait over there.
const LONGEST_MARK := 1000
const CREDITS_A_SECOND := 50  ## At most.
const FIRST_PAUSE_MS := 250  ## Before a restart; twice as long before the next one in a row,
const LONGEST_PAUSE_MS := 8000  ## up to this.
const LONGEST_LINE := 1 << 16  ## Of its stderr: what is longer comes in pieces.
const NUMBERS: Array[String] = [
	"sample_rate", "channels", "frame_samples", "quantizers", "codebook_size", "frame_bytes", "max_audio_bytes"
]

var format := {}  ## What the HANDSHAKE said: sample_rate, channels, frame_bytes, ...
var underruns := 0  ## Pulls that ran dry in the middle of a stream. While a prebuffer fills, none is counted.
var buffer_seconds := 10.0
var prebuffer_ms := 0
var fade_ms := 5
var restart := 0

var state := State.STOPPED  ## STARTING also while a crashed process is started again.
var reason := {}  ## Why it FAILED: code and message, as of [signal failed].
var pid := -1  ## The process.
var version := ""  ## The program's, and
var demo := false  ## whether its weights are the demo's, as the HANDSHAKE said.
var restarts := 0  ## How often a crashed process was started again.
var stream := -1  ## The number of the stream that was opened last.
var played := {"stream": -1, "samples": 0}  ## What was pulled last, and how much of it; what fades counts for nothing.

var _program := ""
var _arguments := PackedStringArray()
var _stdio: FileAccess
var _stderr: FileAccess
var _keeper: Thread  # reads, and starts again what crashed
var _log_reader: Thread
var _writer: Thread
var _work := Semaphore.new()  # for the writer: posted for each message that waits, and at the end
var _mutex := Mutex.new()
# Behind the mutex:
var _stream_is_open := false
var _ring := Ring.new()
var _voices := {}  # by number; those that are over are not there
var _numbers_used := 0
var _is_gone := true
var _is_stopping := false
var _fatal_was_said := false
var _fatal_text := ""
var _opened := 0  # streams
var _cancelled := 0  # how many had been opened at the last cancel
var _restarts_in_a_row := 0
var _cancels := 0  # for which no END has come back
var _waiting: Array[PackedByteArray] = []  # messages that the writer has not taken
var _first_waiting := 0  # the ones before it were taken
var _waiting_bytes := 0  # with those of the message that is being written


## False where there is no way to start a program. One that is not there is said by [signal failed].
func start(program: String, arguments: PackedStringArray) -> bool:
	_program = program
	_arguments = arguments
	state = State.STARTING
	if not _spawn():
		return false
	_keeper = Thread.new()
	_keeper.start(_keep)
	return true


## Adds packed frames, frame_bytes each, to the stream, and opens one where none is open. Takes all of them or, where
## more than 4 MiB would wait for the process, none.
func feed(packed: PackedByteArray) -> bool:
	if state != State.READY or packed.size() % int(format["frame_bytes"]) != 0:
		push_error("feed whole frames, a multiple of frame_bytes, while the state is READY")
		return false
	_mutex.lock()
	var is_taken := not _is_gone and _has_room_for(_bytes_of(packed))
	if is_taken:
		_opened += 0 if _stream_is_open else 1
		_stream_is_open = true
		stream = _opened - 1
		_send_frames(packed, Whose.PLAIN)
	_mutex.unlock()
	return is_taken


## The same for codes, `quantizers` for each frame.
func feed_codes(codes: PackedInt32Array) -> bool:
	var packed := pack(codes)
	return feed(packed) if packed.size() > 0 or codes.is_empty() else false


## Codes as packed frames; none where they are bad, and [method @GlobalScope.push_error] says why.
func pack(codes: PackedInt32Array) -> PackedByteArray:
	if state != State.READY:
		return PackedByteArray()
	var quantizers := int(format["quantizers"])
	var frame_bytes := int(format["frame_bytes"])
	var bits := 0
	while 1 << bits < int(format["codebook_size"]):
		bits += 1
	if codes.size() % quantizers != 0:
		push_error("%d codes are no whole frames: feed a multiple of %d" % [codes.size(), quantizers])
		return PackedByteArray()
	var packed := PackedByteArray()
	@warning_ignore("integer_division")
	packed.resize(codes.size() / quantizers * frame_bytes)
	for i in codes.size():
		if codes[i] < 0 or codes[i] >= int(format["codebook_size"]):
			push_error("code %d: 0 to %d are allowed" % [codes[i], int(format["codebook_size"]) - 1])
			return PackedByteArray()
		for bit in bits:  # least significant first; each frame starts at a byte
			var at := i % quantizers * bits + bit
			@warning_ignore("integer_division")
			var byte := i / quantizers * frame_bytes + (at >> 3)
			packed[byte] = packed[byte] | (codes[i] >> bit & 1) << (at & 7)
	return packed


## The stream is complete.
func finish() -> bool:
	_mutex.lock()
	if _stream_is_open:
		_send(Kind.END, PackedByteArray(), Whose.PLAIN)
	_stream_is_open = false
	var is_alive := not _is_gone
	_mutex.unlock()
	return is_alive


## Be silent, now: drops whatever was fed, and all that waits to be pulled but for what fades out.
func cancel() -> bool:
	_mutex.lock()
	_stream_is_open = false
	_ring.silence()
	var is_answered := not _is_gone and state != State.STARTING
	if is_answered:
		_forget_waiting(Whose.PLAIN)
		_cancels += 1  # what comes is dropped until as many ENDs have come back
		_cancelled = _opened
		_send(Kind.CANCEL, str(_opened).to_ascii_buffer(), Whose.PLAIN, true)
	_mutex.unlock()
	return is_answered


## Exactly so many samples, left and right, with silence where there are none.
func pull(samples: int) -> PackedVector2Array:
	_mutex.lock()
	var out := _ring.pull(samples)
	played = _ring.played
	underruns = _ring.underruns
	_mutex.unlock()
	return out


## Is something to be pulled, now or later?
func is_speaking() -> bool:
	_mutex.lock()
	var fades := _ring.is_fading() and not _is_stopping
	var answer := fades or _ring.bytes > 0 or (not _is_gone and _ring.ended < _opened)
	_mutex.unlock()
	return answer


## A voice for one utterance, with room for so much of it, and what it gathers before it sounds. Where there is too much
## to do, a higher `priority` goes first: 3 to -4. Null, and [method @GlobalScope.push_error] says why, where the process
## takes no numbered streams or is not READY.
func open(ring_seconds := 2.0, gathered_ms := 0.0, priority := 0) -> Voice:
	var is_good := ring_seconds >= 0.0 and ring_seconds <= 600.0 and gathered_ms >= 0.0 and gathered_ms <= 60000.0
	if not is_good or priority < -4 or priority > 3:
		push_error("open(%s, %s, %s): 0 to 600 seconds, 0 to 60000 ms and -4 to 3" % [ring_seconds, gathered_ms, priority])
		return null
	if state != State.READY:
		push_error("open a voice while the state is READY")
		return null
	if max_streams() < 1:
		push_error("the process takes one stream at a time (its HANDSHAKE has no max_streams): update it, or feed Mossnano itself")
		return null
	var voice := Voice.new(self, ring_seconds, gathered_ms)
	_mutex.lock()
	if _is_gone:
		voice.reason = "the process has just ended"
	else:
		voice.number = _numbers_used
		_numbers_used += 1
		_voices[voice.number] = voice
		var settings := '{"window_samples":%d,"urgency":%d}' % [voice.window, 3 - priority]
		_send(Kind.SETTINGS, settings.to_ascii_buffer(), voice.number)
	_mutex.unlock()
	return voice


## How many voices the process takes at once; 0: it takes none.
func max_streams() -> int:
	return int(format.get("max_streams", 0))


## Ends the process and our threads; nothing of it is left.
func stop() -> void:
	if _keeper == null:
		return
	_mutex.lock()
	_is_stopping = true
	_ring.silence()
	_end_voices("stopped")
	if not _is_gone:
		OS.kill(pid)  # Godot cannot close stdin alone, and a decoder has nothing to save
	_mutex.unlock()
	_keeper.wait_to_finish()
	_keeper = null
	state = State.STOPPED


# --- the process; its keeper is a thread ------------------------------------------------------------------------------


func _spawn() -> bool:
	var made := OS.execute_with_pipe(_program, _arguments)
	if made.is_empty():
		_fail("not_started", "%s cannot be started: is it installed and on the PATH?" % _program)
		return false
	pid = made["pid"]
	_stdio = made["stdio"]
	_stderr = made["stderr"]
	_is_gone = false
	_fatal_was_said = false
	_log_reader = Thread.new()
	_log_reader.start(_read_log)
	_writer = Thread.new()
	_writer.start(_write)
	return true


func _keep() -> void:
	while true:
		_read()
		var is_restarted := _bury()
		_log_reader.wait_to_finish()
		_writer.wait_to_finish()
		_stdio.close()
		_stderr.close()
		if not is_restarted or not _pause():
			return
		_mutex.lock()  # stop looks for a process to end with it
		var is_up := not _is_stopping and _spawn()
		_mutex.unlock()
		if not is_up:
			return
		restarts += 1


## Is it to be started again?
func _bury() -> bool:
	_mutex.lock()
	_is_gone = true
	var is_restarted := _may_restart()
	var streams := _lose_streams()
	_end_voices(_fatal_text if _fatal_was_said else "the process ended by itself (process_ended)")
	if is_restarted:
		state = State.STARTING
	_mutex.unlock()
	_work.post()  # the writer sees that it is gone
	if not streams.is_empty() and not _is_stopping:
		lost.emit.call_deferred(streams)
	if is_restarted or not _fatal_was_said:
		_say("process_ended", "the process ended by itself: the lines before, from its stderr, say why", true)
	return is_restarted


## A process that never became ready would not do so the next time.
func _may_restart() -> bool:
	return not format.is_empty() and not _is_stopping and _restarts_in_a_row < restart


## What has come of them can still be pulled, and then fades out. Call it with the mutex.
func _lose_streams() -> PackedInt32Array:
	var streams := PackedInt32Array()
	for number in range(maxi(_ring.ended, _cancelled), _opened):
		streams.append(number)
	_ring.cut()
	_stream_is_open = false
	_ring.ended = _opened
	_forget_waiting(Whose.ALL)
	_cancels = 0
	return streams


## Call it with the mutex.
func _end_voices(why: String) -> void:
	for voice in _voices.values():
		voice.ring.cut()
		voice.end(why)


## False where stop was called meanwhile.
func _pause() -> bool:
	var until := Time.get_ticks_msec() + mini(FIRST_PAUSE_MS << _restarts_in_a_row, LONGEST_PAUSE_MS)
	_restarts_in_a_row += 1
	while Time.get_ticks_msec() < until and not _is_stopping:
		OS.delay_msec(10)
	return not _is_stopping


# --- the reader -------------------------------------------------------------------------------------------------------


func _read() -> void:
	while true:
		var head := _read_all(HEAD_BYTES)
		if head.size() < HEAD_BYTES:
			return
		var length := head.decode_u32(0)
		if length < 1 or length > LONGEST:
			_say("framing_lost", "the program does not speak the protocol: does it print to its stdout?", true)
			OS.kill(pid)
			return
		var payload := _read_all(length - 1)
		if payload.size() < length - 1:
			return
		_take(head[4], payload)


func _read_all(bytes: int) -> PackedByteArray:
	var data := PackedByteArray()
	while data.size() < bytes:
		var piece := _stdio.get_buffer(bytes - data.size())
		if piece.is_empty() and not OS.is_process_running(pid):
			break
		if piece.is_empty():
			OS.delay_msec(2)
		data.append_array(piece)
	return data


func _read_log() -> void:
	var text := PackedByteArray()  # of a line that is not whole
	while true:  # a pipe that nobody reads would stop the process one day
		var piece := _stderr.get_buffer(4096)
		text.append_array(piece)
		var end := text.find(10)
		while end >= 0:
			_log(text.slice(0, end))
			text = text.slice(end + 1)
			end = text.find(10)
		if piece.is_empty() and not OS.is_process_running(pid):
			break
		if piece.is_empty():
			OS.delay_msec(50)
		if text.size() > LONGEST_LINE:
			_log(text)
			text = PackedByteArray()
	if not text.is_empty():
		_log(text)


func _log(line: PackedByteArray) -> void:
	_emit_log.call_deferred(line.get_string_from_utf8().trim_suffix("\r"))


func _emit_log(line: String) -> void:
	if log_line.get_connections().is_empty():
		print(line)
	log_line.emit(line)


func _take(kind: int, payload: PackedByteArray) -> void:  # unknown kinds and keys are passed over
	if (kind == Kind.END or kind == NUMBERED + Kind.END) and _fatal_was_said:
		return  # behind a fatal ERROR it says what was sent, which is not all
	if kind >= NUMBERED:
		_take_numbered(kind - NUMBERED, payload)
		return
	if kind == Kind.AUDIO:
		_push(payload)
	if kind != Kind.HANDSHAKE and kind != Kind.ERROR and kind != Kind.END:
		return
	var said: Dictionary = JSON.parse_string(payload.get_string_from_utf8())
	if kind == Kind.HANDSHAKE and state == State.STARTING:
		_shake_hands(said)
	elif kind == Kind.ERROR:
		_say(said["code"], said["message"], said["fatal"])
	elif kind == Kind.END:
		_mutex.lock()
		_ring.is_sounding = false
		if said["cancelled"]:
			_ring.ended = int(said["echo"])  # how many streams were open when we sent that CANCEL: all are over
			_cancels -= 1
		else:
			_ring.ended += 1
			_restarts_in_a_row = 0
		_mutex.unlock()


func _take_numbered(kind: int, payload: PackedByteArray) -> void:
	var number := payload.decode_u32(0)
	var rest := payload.slice(4)
	var said: Dictionary = JSON.parse_string(rest.get_string_from_utf8()) if kind == Kind.ERROR else {}
	_mutex.lock()
	var voice: Voice = _voices.get(number)
	if voice != null:
		voice.take(kind, rest, said)
	_mutex.unlock()
	if kind == Kind.END and voice != null:  # one that was cancelled is not there any more
		_restarts_in_a_row = 0
	if kind == Kind.ERROR and voice != null:
		_say(said["code"], said["message"], said["fatal"])


func _shake_hands(said: Dictionary) -> void:
	var is_ours: bool = said.get("protocol") == 1 and said.get("direction") == "decode"
	for name in NUMBERS:
		is_ours = is_ours and int(said.get(name, 0)) > 0
	if not is_ours:
		_say("handshake", "this is no decoder of protocol 1: update mossnano.gd, or drop --encode", true)
		OS.kill(pid)
		return
	if said.get("sample_format", "s16le") != "s16le":
		_say("handshake", "mossnano.gd takes s16le: drop --sample-format", true)
		OS.kill(pid)
		return
	format = said
	_ring.set_up(format, fade_ms, prebuffer_ms, buffer_seconds)
	version = said.get("version", "")
	demo = said.get("demo", false)
	state = State.READY
	ready_to_feed.emit.call_deferred()


func _push(pcm: PackedByteArray) -> void:
	var most := buffer_seconds * format["sample_rate"] * format["channels"] * 2
	while true:
		_mutex.lock()
		var is_dropped := _cancels > 0 or _is_stopping
		var has_room := _ring.bytes <= most
		if has_room and not is_dropped:
			_ring.push(pcm)
		_mutex.unlock()
		if has_room or is_dropped:
			return
		OS.delay_msec(2)


func _say(code: String, message: String, fatal: bool) -> void:
	_fatal_was_said = _fatal_was_said or fatal
	if fatal:
		_fatal_text = "%s (%s)" % [message, code]
	if _is_stopping:
		return
	if fatal and not _may_restart():
		_fail(code, message)
	else:
		failed.emit.call_deferred(code, message, false)


func _fail(code: String, message: String) -> void:
	reason = {"code": code, "message": message}
	state = State.FAILED
	failed.emit.call_deferred(code, message, true)


# --- the writer -------------------------------------------------------------------------------------------------------


func _write() -> void:
	while true:
		_work.wait()
		_mutex.lock()
		var is_over := _is_gone or _is_stopping
		var message := _take_waiting()
		_mutex.unlock()
		if is_over:
			return
		if not message.is_empty() and OS.is_process_running(pid):
			_stdio.store_buffer(message)  # waits for as long as the process does not read
		_mutex.lock()
		_waiting_bytes -= message.size()
		_mutex.unlock()


## The first message that waits, or nothing where cancel forgot it. Call it with the mutex.
func _take_waiting() -> PackedByteArray:
	if _first_waiting == _waiting.size():
		return PackedByteArray()
	var message := _waiting[_first_waiting]
	_first_waiting += 1
	if _first_waiting == 1000:  # not each time: what is behind moves up
		_waiting = _waiting.slice(_first_waiting)
		_first_waiting = 0
	return message


## Messages that have not left never will: the CANCEL that follows would drop what they bring. Says whether one of them
## would have opened a numbered stream. Call it with the mutex.
func _forget_waiting(whose: int) -> bool:
	var kept: Array[PackedByteArray] = []
	var would_open := false
	for message in _waiting.slice(_first_waiting):
		var number: int = message.decode_u32(HEAD_BYTES) if message[4] >= NUMBERED else Whose.PLAIN
		if whose != Whose.ALL and whose != number:
			kept.append(message)
			continue
		_waiting_bytes -= message.size()
		would_open = would_open or message[4] == Kind.SETTINGS + NUMBERED
		if message[4] == Kind.CANCEL:
			_cancels -= 1  # no END will answer it
	_waiting = kept
	_first_waiting = 0
	return would_open


## Call it with the mutex.
func _has_room_for(more: int) -> bool:
	if _waiting_bytes + more <= WAITING_BYTES:
		return true
	var found := "%d bytes wait for the process to take them, and %d more were fed" % [_waiting_bytes, more]
	push_error("%s: %d (4 MiB) are allowed, feed less or later" % [found, WAITING_BYTES])
	return false


## So many bytes are the messages for these frames, at most.
func _bytes_of(packed: PackedByteArray) -> int:
	@warning_ignore("integer_division")
	return packed.size() + (packed.size() / _piece_bytes() + 1) * (HEAD_BYTES + 4)


func _piece_bytes() -> int:
	var frame_bytes := int(format["frame_bytes"])
	return maxi(1, floori(float(PIECE_BYTES) / frame_bytes)) * frame_bytes


## Call it with the mutex. Sends one message at least: an empty TOKENS opens the stream too, and without one its END
## would be out of place.
func _send_frames(packed: PackedByteArray, whose: int) -> void:
	for at in range(0, maxi(1, packed.size()), _piece_bytes()):
		_send(Kind.TOKENS, packed.slice(at, at + _piece_bytes()), whose)


## Call it with the mutex.
func _send(kind: Kind, payload: PackedByteArray, whose: int, is_first := false) -> void:
	var message := PackedByteArray()
	var number_bytes := 0 if whose == Whose.PLAIN else 4
	message.resize(HEAD_BYTES + number_bytes)
	message.encode_u32(0, number_bytes + payload.size() + 1)
	message[4] = kind
	if whose != Whose.PLAIN:
		message[4] = kind + NUMBERED
		message.encode_u32(HEAD_BYTES, whose)
	message.append_array(payload)
	if is_first:
		_waiting.insert(_first_waiting, message)
	else:
		_waiting.append(message)
	_waiting_bytes += message.size()
	_work.post()


# --- a voice ----------------------------------------------------------------------------------------------------------


## One utterance of [method open]. It is pulled on the main thread, as all that it signals is emitted there.
class Voice:
	extends RefCounted

	signal marked(text: String, sample: int)  ## A [method mark] is being played: its sample was pulled.
	signal ended(reason: String)  ## No more comes of it; what came can still be pulled. "": as it should.

	var gain := 1.0  ## The next [method pull] goes there from what holds.
	var mono := false  ## Left and right are the mean of both.
	var reason := ""  ## Once it is over: what went wrong.
	var number := -1  ## Of its stream.
	var window := 0  ## Samples that the process may send ahead.
	var ring := Ring.new()
	var _client: Mossnano  # until it is over
	var _mutex: Mutex  # the client's; behind it:
	var _is_open := true
	var _has_end := false  # of its own, that is: it was heard of to its end
	var _was_cancelled := false
	var _fault := ""  # the first ERROR
	var _fed_bytes := 0
	var _come_samples := 0
	var _granted := 0  # samples
	var _texts: Array[String] = []  # of marks that came,
	var _places: Array[int] = []  # and their samples
	var _marks_out := 0  # that were not played, wherever they are
	var _gain_was := -1.0

	func _init(client: Mossnano, ring_seconds: float, gathered_ms: float) -> void:
		_client = client
		_mutex = client._mutex
		var rate := float(client.format["sample_rate"])
		var chunk_frames: Variant = client.format.get("chunk_frames")  # null where chunks may be cut
		var chunk := ceili((chunk_frames if chunk_frames else 1) * _frame_samples())
		if client.format.get("codec_sample_rate", rate) != rate:
			chunk = maxi(chunk, ceili(rate / 10.0))  # a resampler's tail is up to 81 ms
		# Or what is gathered could never come.
		window = maxi(floori(ring_seconds * rate), floori(gathered_ms * rate / 1000.0) + chunk)
		_granted = window
		ring.set_up(client.format, client.fade_ms, gathered_ms, window / rate)

	## So many samples are heard so far.
	func played() -> int:
		return ring.played["samples"]

	func underruns() -> int:
		return ring.underruns

	## Adds packed frames. False, and [method @GlobalScope.push_error] says why, where too much waits: 4 MiB in all, or
	## 768 KiB of this voice; and where it is finished or over.
	func feed(packed: PackedByteArray) -> bool:
		_mutex.lock()
		var is_taken := _is_open and _has_room_for(packed)
		if is_taken:
			_fed_bytes += packed.size()
			_client._send_frames(packed, number)
		_mutex.unlock()
		return is_taken

	## The same for codes, `quantizers` for each frame.
	func feed_codes(codes: PackedInt32Array) -> bool:
		var client := _client  # which another thread may forget
		var packed := client.pack(codes) if client != null else PackedByteArray()
		return feed(packed) if packed.size() > 0 or codes.is_empty() else false

	## A place between what was fed and what will be. Up to 1,000 bytes, and 128 that were not played yet.
	func mark(text: String) -> bool:
		var bytes := text.to_utf8_buffer()
		_mutex.lock()
		var has_room := _marks_out < MOST_MARKS
		var is_good := bytes.size() <= LONGEST_MARK and has_room
		var is_taken := _is_open and is_good and _client._has_room_for(bytes.size() + HEAD_BYTES + 4)
		if is_taken:
			_marks_out += 1
			_client._send(Kind.MARK, bytes, number)
		_mutex.unlock()
		if not has_room:
			push_error("%d marks were not played: mark later" % MOST_MARKS)
		elif not is_good:
			push_error("a mark of %d bytes: %d are allowed" % [bytes.size(), LONGEST_MARK])
		return is_taken

	## It is complete.
	func finish() -> bool:
		_mutex.lock()
		var was_open := _is_open
		if was_open:
			_client._send(Kind.END, PackedByteArray(), number)
		_is_open = false
		_mutex.unlock()
		return was_open

	## Be silent, now: but for what fades out, nothing can be pulled any more. Says how many samples were heard.
	func cancel() -> int:
		_mutex.lock()
		_was_cancelled = true
		ring.silence()
		if _client != null:
			# If its first message is still here, there is no stream to cancel.
			if not _client._forget_waiting(number):
				_client._send(Kind.CANCEL, PackedByteArray(), number, true)
			end("")
		_mutex.unlock()
		return played()

	## Exactly so many samples, left and right, with silence where there are none.
	func pull(samples: int) -> PackedVector2Array:
		_mutex.lock()
		var out := ring.pull(samples)
		_grant()
		_pass_marks()
		_mutex.unlock()
		var before := gain if _gain_was < 0.0 else _gain_was
		_gain_was = gain
		if mono or before != 1.0 or gain != 1.0:
			for i in samples:
				var sample := out[i] * (before + (gain - before) * float(i + 1) / samples)
				out[i] = Vector2(sample.x + sample.y, sample.x + sample.y) / 2.0 if mono else sample
		return out

	## Is something to be pulled, now or later?
	func is_speaking() -> bool:
		_mutex.lock()
		var answer := ring.is_fading() or ring.bytes > 0 or _client != null
		_mutex.unlock()
		return answer

	# All that follows is called with the mutex.

	func take(kind: int, payload: PackedByteArray, said: Dictionary) -> void:
		if kind == Kind.AUDIO and ring.bytes + payload.size() > window * ring.sample_bytes:
			end("the process sent more than it was granted")
		elif kind == Kind.AUDIO:
			ring.push(payload)
			@warning_ignore("integer_division")
			_come_samples += payload.size() / ring.sample_bytes
		elif kind == Kind.MARK:
			_places.append(payload.decode_s64(0))
			_texts.append(payload.slice(8).get_string_from_utf8())
		elif kind == Kind.ERROR and _fault == "":
			_fault = "%s (%s)" % [said["message"], said["code"]]
			if said["code"] == "too_many_streams" or said["code"] == "late_stream":
				end(_fault)  # no END follows
		elif kind == Kind.END:
			_has_end = true
			end(_fault)
			_pass_marks()

	func end(why: String) -> void:
		if _client == null:
			return
		_client._voices.erase(number)
		_client = null
		_is_open = false
		reason = why
		ring.is_sounding = false
		ring.ended = 1
		ended.emit.call_deferred(why)

	func _frame_samples() -> float:
		var rate: float = _client.format["sample_rate"]
		return _client.format["frame_samples"] * rate / _client.format.get("codec_sample_rate", rate)

	func _has_room_for(packed: PackedByteArray) -> bool:
		var frame_bytes := int(_client.format["frame_bytes"])
		if packed.size() % frame_bytes != 0:
			push_error("feed whole frames, a multiple of %d bytes" % frame_bytes)
			return false
		var ahead := _fed_bytes - floori(_come_samples / _frame_samples()) * frame_bytes
		if ahead + packed.size() > VOICE_BYTES:
			var found := "%d bytes of frames wait to be decoded in this voice, and %d more were fed" % [ahead, packed.size()]
			push_error("%s: %d are allowed, feed less or later" % [found, VOICE_BYTES])
			return false
		return _client._has_room_for(_client._bytes_of(packed))

	## What was pulled, and the window, may have come in all. Often enough, but not for each sample; and what waits with
	## nothing to pull waits for this.
	func _grant() -> void:
		var all := window + played()
		var is_worth_it := all - _granted >= ring.rate / CREDITS_A_SECOND or (all > _granted and ring.bytes == 0)
		if _client == null or not is_worth_it:
			return
		_granted = all
		var payload := PackedByteArray()
		payload.resize(8)
		payload.encode_u64(0, all)
		_client._send(Kind.CREDIT, payload, number)

	func _pass_marks() -> void:
		# At its end a mark may be behind the last sample.
		var passed := played() + (1 if _has_end and not _was_cancelled and ring.bytes == 0 else 0)
		while not _places.is_empty() and _places[0] < passed:
			_marks_out -= 1
			marked.emit.call_deferred(_texts.pop_front(), _places.pop_front())


# --- what is heard ----------------------------------------------------------------------------------------------------


## PCM that waits to be pulled, of one stream after the other. All of it is called with the mutex.
class Ring:
	extends RefCounted

	var rate := 0.0
	var sample_bytes := 4
	var bytes := 0  ## That wait.
	var underruns := 0
	var played := {"stream": -1, "samples": 0}
	var ended := 0  ## Streams; so that is also the number of the one whose PCM comes.
	var is_sounding := false  ## PCM of a stream came, its END did not.
	var _pcm: Array[PackedByteArray] = []  # what waits to be pulled,
	var _pcm_streams: Array[int] = []  # which streams it belongs to,
	var _cuts: Array[bool] = []  # and whether the rest of the stream was lost
	var _first_at := 0  # how much of the first one was pulled
	var _prebuffer_bytes := 0
	var _is_holding := true  # until a prebuffer is there
	var _is_heard := false  # the last sample that was given out was no silence
	var _last := Vector2()  # that sample
	var _tail := PackedVector2Array()  # of a fade out, to be pulled before anything else
	var _fade_samples := 0
	var _risen := 0  # how many samples of a fade in were given out,
	var _rise := 0  # of how many

	## More than is ever kept is never waited for.
	func set_up(format: Dictionary, fade_ms: float, prebuffer_ms: float, most_seconds: float) -> void:
		rate = format["sample_rate"]
		sample_bytes = 2 * int(format["channels"])
		_fade_samples = floori(fade_ms * rate / 1000.0)
		_prebuffer_bytes = floori(minf(prebuffer_ms, most_seconds * 1000.0) * rate / 1000.0) * sample_bytes

	func push(pcm: PackedByteArray) -> void:
		_pcm.append(pcm)
		_pcm_streams.append(ended)
		_cuts.append(false)
		bytes += pcm.size()
		is_sounding = true

	func pull(samples: int) -> PackedVector2Array:
		var out := PackedVector2Array()
		var was_holding := _is_holding
		var piece := _give(samples)
		while not piece.is_empty():
			out.append_array(piece)
			piece = _give(samples - out.size())
		if out.size() < samples:
			if is_sounding and not (was_holding and _is_holding):
				underruns += 1
				_fade_out()
				out.append_array(_give_tail(samples - out.size()))
			_is_holding = _prebuffer_bytes > 0
			_is_heard = false
		out.resize(samples)  # zeros
		return out

	func is_fading() -> bool:
		return not _tail.is_empty()

	## Drops all but for a fade out.
	func silence() -> void:
		is_sounding = false
		_fade_out()
		_pcm.clear()
		_pcm_streams.clear()
		_cuts.clear()
		bytes = 0
		_first_at = 0

	## The rest of the stream is lost: what came of it can still be pulled, and then fades out.
	func cut() -> void:
		if is_sounding and not _cuts.is_empty():
			_cuts[_cuts.size() - 1] = true
		elif is_sounding:
			_fade_out()
		is_sounding = false

	## Up to so many samples, of a fade out or else of what waits; none where it is dry.
	func _give(most: int) -> PackedVector2Array:
		return _give_pcm(most) if _tail.is_empty() else _give_tail(most)

	func _give_tail(most: int) -> PackedVector2Array:
		var given := _tail.slice(0, most)
		_tail = _tail.slice(given.size())
		return given

	func _give_pcm(most: int) -> PackedVector2Array:
		if most == 0 or _pcm.is_empty() or (_is_holding and not _has_prebuffer()):
			return PackedVector2Array()
		var given := _decoded(_pcm[0], _first_at, most)
		_first_at += given.size() * sample_bytes
		bytes -= given.size() * sample_bytes
		var before: int = played["samples"] if played["stream"] == _pcm_streams[0] else 0
		played = {"stream": _pcm_streams[0], "samples": before + given.size()}  # a new one: who asked keeps the old one
		for i in given.size():
			if _risen == _rise:
				break
			given[i] = given[i] * (float(_risen) / _rise)
			_risen += 1
		_last = given[given.size() - 1]
		_is_heard = true
		_is_holding = false
		if _first_at >= _pcm[0].size():
			_first_at = 0
			_pcm.pop_front()
			_pcm_streams.pop_front()
			if _cuts.pop_front():
				_fade_out()
		return given

	func _decoded(pcm: PackedByteArray, first: int, most: int) -> PackedVector2Array:
		var samples := PackedVector2Array()
		var right := 2 if sample_bytes > 2 else 0
		for at in range(first, mini(pcm.size(), first + most * sample_bytes), sample_bytes):
			samples.append(Vector2(pcm.decode_s16(at), pcm.decode_s16(at + right)) / 32767.0)
		return samples

	## The rest of a stream that has ended is never held back.
	func _has_prebuffer() -> bool:
		return _pcm_streams[0] < ended or bytes >= _prebuffer_bytes

	## Makes a tail that leads from the last sample to silence: over what would have come, and past that over its end, held.
	func _fade_out() -> void:
		if not _is_heard:
			return
		_is_heard = false
		var over := PackedVector2Array()
		if _risen == _rise:  # else what comes is louder than the last sample was made
			for pcm in _pcm:
				if over.size() < _fade_samples:
					over.append_array(_decoded(pcm, _first_at if over.is_empty() else 0, _fade_samples - over.size()))
		_tail = PackedVector2Array()
		for i in _fade_samples:
			if i < over.size():
				_last = over[i]
			_tail.append(_last * (1.0 - float(i + 1) / _fade_samples))
		_risen = 0
		_rise = _fade_samples
