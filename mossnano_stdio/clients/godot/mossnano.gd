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
enum Kind { HANDSHAKE = 0, AUDIO = 1, TOKENS = 4, ERROR = 5, END = 7, CANCEL = 8 }

const LONGEST := 1 << 20  ## No message of the process is longer.
const HEAD_BYTES := 5  ## Of a message: its length and its kind.
const WAITING_BYTES := 4 << 20  ## Of messages that may wait here for the process.
const PIECE_BYTES := 4096  ## Of what is fed in one message: what a pipe takes in one go.
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
var _pcm: Array[PackedByteArray] = []  # what waits to be pulled,
var _pcm_streams: Array[int] = []  # which streams it belongs to,
var _cuts: Array[bool] = []  # and whether the rest of the stream was lost
var _pcm_bytes := 0
var _first_at := 0  # how much of the first one was pulled
var _is_holding := true  # until a prebuffer is there
var _is_heard := false  # the last sample that was given out was no silence
var _last := Vector2()  # that sample
var _tail := PackedVector2Array()  # of a fade out, to be pulled before anything else
var _risen := 0  # how many samples of a fade in were given out,
var _rise := 0  # of how many
var _is_sounding := false  # PCM of a stream came, its END did not
var _is_gone := true
var _is_stopping := false
var _fatal_was_said := false
var _opened := 0  # streams
var _ended := 0  # so that is also the number of the stream whose AUDIO comes
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
	var frame_bytes := int(format["frame_bytes"])
	var step := maxi(1, floori(float(PIECE_BYTES) / frame_bytes)) * frame_bytes
	# Once at least: an empty TOKENS opens the stream too, and without one its END would be out of place.
	var starts := range(0, maxi(1, packed.size()), step)
	_mutex.lock()
	var is_taken := not _is_gone and _has_room_for(packed.size() + starts.size() * HEAD_BYTES)
	if is_taken:
		_opened += 0 if _stream_is_open else 1
		_stream_is_open = true
		stream = _opened - 1
		for at in starts:
			_send(Kind.TOKENS, packed.slice(at, at + step))
	_mutex.unlock()
	return is_taken


## The same for codes, `quantizers` for each frame.
func feed_codes(codes: PackedInt32Array) -> bool:
	if state != State.READY:
		return feed(PackedByteArray())
	var quantizers := int(format["quantizers"])
	var frame_bytes := int(format["frame_bytes"])
	var bits := 0
	while 1 << bits < int(format["codebook_size"]):
		bits += 1
	if codes.size() % quantizers != 0:
		push_error("%d codes are no whole frames: feed a multiple of %d" % [codes.size(), quantizers])
		return false
	var packed := PackedByteArray()
	@warning_ignore("integer_division")
	packed.resize(codes.size() / quantizers * frame_bytes)
	for i in codes.size():
		if codes[i] < 0 or codes[i] >= int(format["codebook_size"]):
			push_error("code %d: 0 to %d are allowed" % [codes[i], int(format["codebook_size"]) - 1])
			return false
		for bit in bits:  # least significant first; each frame starts at a byte
			var at := i % quantizers * bits + bit
			@warning_ignore("integer_division")
			var byte := i / quantizers * frame_bytes + (at >> 3)
			packed[byte] = packed[byte] | (codes[i] >> bit & 1) << (at & 7)
	return feed(packed)


## The stream is complete.
func finish() -> bool:
	_mutex.lock()
	if _stream_is_open:
		_send(Kind.END, PackedByteArray())
	_stream_is_open = false
	var is_alive := not _is_gone
	_mutex.unlock()
	return is_alive


## Be silent, now: drops whatever was fed, and all that waits to be pulled but for what fades out.
func cancel() -> bool:
	_mutex.lock()
	_stream_is_open = false
	_is_sounding = false
	_fade_out()
	_drop()
	var is_answered := not _is_gone and state != State.STARTING
	if is_answered:
		_forget_waiting()
		_cancels += 1  # what comes is dropped until as many ENDs have come back
		_cancelled = _opened
		_send(Kind.CANCEL, str(_opened).to_ascii_buffer())
	_mutex.unlock()
	return is_answered


## Exactly so many samples, left and right, with silence where there are none.
func pull(samples: int) -> PackedVector2Array:
	var out := PackedVector2Array()
	_mutex.lock()
	var was_holding := _is_holding
	var piece := _give(samples)
	while not piece.is_empty():
		out.append_array(piece)
		piece = _give(samples - out.size())
	if out.size() < samples:
		if _is_sounding and not (was_holding and _is_holding):
			underruns += 1
			_fade_out()
			out.append_array(_give_tail(samples - out.size()))
		_is_holding = prebuffer_ms > 0
		_is_heard = false
	_mutex.unlock()
	out.resize(samples)  # zeros
	return out


## Is something to be pulled, now or later?
func is_speaking() -> bool:
	_mutex.lock()
	var fades := not _tail.is_empty() and not _is_stopping
	var answer := fades or _pcm_bytes > 0 or (not _is_gone and _ended < _opened)
	_mutex.unlock()
	return answer


## Ends the process and our threads; nothing of it is left.
func stop() -> void:
	if _keeper == null:
		return
	_mutex.lock()
	_is_stopping = true
	_fade_out()
	_drop()
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
	for number in range(maxi(_ended, _cancelled), _opened):
		streams.append(number)
	if _is_sounding and not _cuts.is_empty():
		_cuts[_cuts.size() - 1] = true
	elif _is_sounding:
		_fade_out()
	_is_sounding = false
	_stream_is_open = false
	_ended = _opened
	_forget_waiting()
	_cancels = 0
	return streams


## False where stop was called meanwhile.
func _pause() -> bool:
	var until := Time.get_ticks_msec() + mini(FIRST_PAUSE_MS << _restarts_in_a_row, LONGEST_PAUSE_MS)
	_restarts_in_a_row += 1
	while Time.get_ticks_msec() < until and not _is_stopping:
		OS.delay_msec(10)
	return not _is_stopping


# --- what is heard; all of it is called with the mutex ----------------------------------------------------------------


func _samples_in(milliseconds: float) -> int:
	return floori(milliseconds * format["sample_rate"] / 1000.0)


func _sample_bytes() -> int:
	return 2 * int(format["channels"])


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
	_first_at += given.size() * _sample_bytes()
	_pcm_bytes -= given.size() * _sample_bytes()
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
	var sample_bytes := _sample_bytes()
	var right := 2 if sample_bytes > 2 else 0
	for at in range(first, mini(pcm.size(), first + most * sample_bytes), sample_bytes):
		samples.append(Vector2(pcm.decode_s16(at), pcm.decode_s16(at + right)) / 32767.0)
	return samples


## The rest of a stream that has ended is never held back. More than is ever kept is never waited for.
func _has_prebuffer() -> bool:
	var wanted := _samples_in(minf(prebuffer_ms, buffer_seconds * 1000.0))
	return _pcm_streams[0] < _ended or _pcm_bytes >= wanted * _sample_bytes()


## Makes a tail that leads from the last sample to silence: over what would have come, and past that over its end, held.
func _fade_out() -> void:
	if not _is_heard:
		return
	_is_heard = false
	var samples := _samples_in(fade_ms)
	var over := PackedVector2Array()
	if _risen == _rise:  # else what comes is louder than the last sample was made
		for pcm in _pcm:
			if over.size() < samples:
				over.append_array(_decoded(pcm, _first_at if over.is_empty() else 0, samples - over.size()))
	_tail = PackedVector2Array()
	for i in samples:
		if i < over.size():
			_last = over[i]
		_tail.append(_last * (1.0 - float(i + 1) / samples))
	_risen = 0
	_rise = samples


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
		_is_sounding = false
		if said["cancelled"]:
			_ended = int(said["echo"])  # how many streams were open when we sent that CANCEL: all are over
			_cancels -= 1
		else:
			_ended += 1
			_restarts_in_a_row = 0
		_mutex.unlock()


func _shake_hands(said: Dictionary) -> void:
	var is_ours: bool = said.get("protocol") == 1 and said.get("direction") == "decode"
	for name in NUMBERS:
		is_ours = is_ours and int(said.get(name, 0)) > 0
	if not is_ours:
		_say("handshake", "this is no decoder of protocol 1: update mossnano.gd, or drop --encode", true)
		OS.kill(pid)
		return
	format = said
	version = said.get("version", "")
	demo = said.get("demo", false)
	state = State.READY
	ready_to_feed.emit.call_deferred()


func _push(pcm: PackedByteArray) -> void:
	var most := buffer_seconds * format["sample_rate"] * format["channels"] * 2
	while true:
		_mutex.lock()
		var is_dropped := _cancels > 0 or _is_stopping
		var has_room := _pcm_bytes <= most
		if has_room and not is_dropped:
			_pcm.append(pcm)
			_pcm_streams.append(_ended)
			_cuts.append(false)
			_pcm_bytes += pcm.size()
			_is_sounding = true
		_mutex.unlock()
		if has_room or is_dropped:
			return
		OS.delay_msec(2)


func _drop() -> void:
	_pcm.clear()
	_pcm_streams.clear()
	_cuts.clear()
	_pcm_bytes = 0
	_first_at = 0


func _say(code: String, message: String, fatal: bool) -> void:
	_fatal_was_said = _fatal_was_said or fatal
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


## Messages that have not left never will: the CANCEL that follows would drop what they bring. Call it with the mutex.
func _forget_waiting() -> void:
	for message in _waiting.slice(_first_waiting):
		_waiting_bytes -= message.size()
		if message[4] == Kind.CANCEL:
			_cancels -= 1  # no END will answer it
	_waiting.clear()
	_first_waiting = 0


## Call it with the mutex.
func _has_room_for(more: int) -> bool:
	if _waiting_bytes + more <= WAITING_BYTES:
		return true
	var found := "%d bytes wait for the process to take them, and %d more were fed" % [_waiting_bytes, more]
	push_error("%s: %d (4 MiB) are allowed, feed less or later" % [found, WAITING_BYTES])
	return false


## Call it with the mutex.
func _send(kind: Kind, payload: PackedByteArray) -> void:
	var message := PackedByteArray()
	message.resize(HEAD_BYTES)
	message.encode_u32(0, payload.size() + 1)
	message[4] = kind
	message.append_array(payload)
	_waiting.append(message)
	_waiting_bytes += message.size()
	_work.post()
