extends AudioStreamPlayer
## Put this on an AudioStreamPlayer: it plays a file of packed frames, res://tokens.bin. NOT RUN in our checks.

var voice := Mossnano.new()


func _ready() -> void:
	voice.failed.connect(func(code: String, message: String, _fatal: bool) -> void: push_error(code, ": ", message))
	voice.ready_to_feed.connect(_speak)
	voice.start("mossnano-stdio", ["--weights", "demo"])


func _speak() -> void:
	var generator := AudioStreamGenerator.new()
	generator.mix_rate = voice.format["sample_rate"]
	generator.buffer_length = 0.1
	stream = generator
	play()
	voice.feed(FileAccess.get_file_as_bytes("res://tokens.bin"))
	voice.finish()


func _process(_delta: float) -> void:
	if playing:
		var playback: AudioStreamGeneratorPlayback = get_stream_playback()
		playback.push_buffer(voice.pull(playback.get_frames_available()))


func _exit_tree() -> void:
	voice.stop()
