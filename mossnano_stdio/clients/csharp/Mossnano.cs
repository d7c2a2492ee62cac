// Mossnano.cs: a voice for Unity and .NET. Starts `mossnano-stdio`, feeds it codec tokens, hands out PCM.
//
// One file, C# 7, no dependency: .NET Framework 4.8, .NET Standard 2.1, .NET 6 and later.
//
//     var voice = Mossnano.Start(new[] { "mossnano-stdio" }, (code, text, fatal) => ...);   // waits for the weights
//     voice.Feed(packedFrames);            // FrameBytes each; or FeedCodes(codes), Quantizers each
//     voice.Finish();                      // the stream is complete
//     voice.Cancel();                      // be silent, now: 5 ms fade out, the next stream may be fed at once
//     voice.Dispose();                     // ends the process; nothing of it is left
//
// Where nobody wants to wait for the weights, Launch gives a voice at once: ask its State, and for Failed its Reason.
// With Restart = N a process that crashes is started again, up to N times in a row (a stream that comes to its end ends
// the row): what was fed until then is lost, and onError and OnLost are told. Played says how much was heard of which
// stream, for barge-in; Stream is the one that Feed opened last. Log gets the lines of the process' stderr.
//
// In Unity: Launch, and
//
//     void OnAudioFilterRead(float[] data, int channels) { voice.Pull(data, channels); }
//
// with Unity's output at SampleRate (Project Settings, Audio). Two threads of yours may use a voice at the same time:
// one that controls, and one that pulls. Pull never locks, waits or allocates. Feed, Finish and Cancel never wait for
// the process, not even for one that hangs: a thread of ours writes, and up to 4 MiB (hours) may wait for it. A Feed
// beyond that is refused whole: it answers false, and onError is told `queue_full`. Another thread of ours reads all
// that the process says, and calls onError: touch no Unity object there. When the ring is full it waits for room, and
// so does the process.
//
// What is cut off, by Cancel or by an underrun, fades out over FadeMs, and what follows fades in; 0 leaves every sample
// as it came. With PrebufferMs a stream sounds once so much of it waits, or all of it, and so again after an underrun:
// fed in real time, with jitter, 100 to 200 are enough.
//
// Tested on Linux with Mono. Unity, Windows, macOS and .NET 6 and later: NOT RUN in our checks. Unity's IL2CPP has
// no System.Diagnostics.Process on some platforms. Protocol version 1, see protocol.md.
using System;
using System.Collections.Generic;
using System.ComponentModel;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Reflection;
using System.Text;
using System.Threading;

public sealed class MossnanoOptions
{
    public string[] Command = { "mossnano-stdio" }; // the program, looked up on the PATH, and its arguments
    public Mossnano.ErrorHandler OnError; // on a thread of ours, as all that follow
    public Action<long[]> OnLost;    // the streams, by number, that were fed to a process that crashed and will not end
    public Action<string> Log;       // the lines of the process' stderr, which otherwise go to ours
    public double RingSeconds = 10;  // PCM that may wait to be pulled
    public double StartSeconds = 60; // how long loading the weights may take
    public double FadeMs = 5;        // out where a CANCEL or an underrun cuts a stream, in where it goes on; 0: a click
    public double PrebufferMs;       // of a stream are gathered before it is heard, and again after an underrun
    public int Restart;              // how many times in a row a process that crashed is started again
}

// Starting: also while a process that crashed is started again.
public enum MossnanoState { Starting, Ready, Failed, Stopped }

public struct MossnanoPlayed
{
    public readonly long Stream;  // the one that was pulled last, from 0; -1 before the first
    public readonly long Samples; // of it that were given out; what fades out counts for nothing

    public MossnanoPlayed(long stream, long samples)
    {
        Stream = stream;
        Samples = samples;
    }
}

public sealed class Mossnano : IDisposable
{
    public delegate void ErrorHandler(string code, string message, bool fatal);

    const int Handshake = 0, Audio = 1, Tokens = 4, Error = 5, End = 7, CancelKind = 8;
    const int LongestMessage = 1 << 20; // of the process
    const int PieceBytes = 1 << 16;     // of what is fed in one message: CANCEL must not wait behind a long one
    const int HeadBytes = 5;            // of a message: its length and its kind
    const int QueueBytes = 4 << 20;     // of messages that the process has not taken yet
    const int MostMarks = 256;          // streams that may begin in the ring
    const int FirstPauseMs = 250;       // before a restart; twice as long before the next one in a row,
    const int LongestPauseMs = 8000;    // up to this
    const int SampleBits = 40;          // of `played`: below the number of the stream
    const int StopMs = 2000;            // how long the process may take to end by itself

    // As the process says in its HANDSHAKE.
    public int SampleRate { get; private set; }
    public int Channels { get; private set; }
    public int FrameSamples { get; private set; }
    public int Quantizers { get; private set; }
    public int CodebookSize { get; private set; }
    public int FrameBytes { get; private set; }
    public int MaxAudioBytes { get; private set; }

    public string Version { get; private set; } // of the program
    public bool Demo { get; private set; }      // the built-in demo, no real codec
    public IReadOnlyDictionary<string, string> Format { get; private set; } // all that it said, as texts

    public MossnanoState State { get { return state; } }
    public string Reason { get; private set; } // why the State is Failed
    public int Pid { get { return pid; } }     // 0: there is no process now
    public int Restarts { get { return restarts; } }

    Process process;
    Stream output;
    Thread writer;
    readonly Thread reader;
    readonly MossnanoOptions options;
    readonly ErrorHandler onError;
    readonly TimeSpan patience;            // with a start
    readonly bool startThrows;             // what goes wrong until the process is ready
    readonly ManualResetEvent started = new ManualResetEvent(false), stopping = new ManualResetEvent(false);
    volatile MossnanoState state;
    volatile int pid, restarts;
    int launches, restartsInARow;
    readonly object gate = new object();   // of the controlling thread and ours; the puller never takes it
    readonly Queue<byte[]> queue = new Queue<byte[]>(); // messages that the writer has not begun yet
    int queuedBytes;                       // theirs, and those of the message that is being written
    string fault;                          // what was said last, for Reason
    bool streamIsOpen, fatalWasSaid, isClosing, isLate;
    short[] ring;                          // values, not samples; indices only grow, % Length says where they are
    long written, taken, dropBefore;       // moved by: reader, puller, reader
    long endOfStream;                      // the reader's: where the last stream that is over ended in the ring,
    long cutAt;                            // and where the last one broke off that was lost
    readonly long[] markAt = new long[MostMarks], markStream = new long[MostMarks];
    long marksWritten, marksTaken;         // moved by: reader, puller. A mark: where in the ring which stream begins
    long markedStream = -1;                // the reader's
    long opened, ended, underruns;         // streams, streams, pulls
    long cancelled;                        // streams that were open at the last CANCEL
    int cancels, cancelsAnswered;
    volatile bool hasRing, isGone, isStopping, isSounding; // sounding: PCM of a stream came, its END did not

    /// <summary>Returns when the process is ready; an InvalidOperationException says why it will not be.</summary>
    public static Mossnano Start(string[] command, ErrorHandler onError = null, double ringSeconds = 10, double startSeconds = 60)
    {
        return Start(new MossnanoOptions
        {
            Command = command, OnError = onError, RingSeconds = ringSeconds, StartSeconds = startSeconds,
        });
    }

    /// <summary>The same, with every option there is.</summary>
    public static Mossnano Start(MossnanoOptions options)
    {
        var voice = new Mossnano(options, true);
        bool isInTime = voice.started.WaitOne(voice.patience + TimeSpan.FromMilliseconds(StopMs));
        if (voice.State == MossnanoState.Ready) return voice;
        voice.Dispose();
        throw new InvalidOperationException(isInTime ? voice.Reason : TooLate);
    }

    /// <summary>The same at once: a voice whose State is Starting. OnError is told what goes wrong meanwhile, too.
    /// Until it is Ready, Feed, Finish and Cancel answer false, and Pull gives silence.</summary>
    public static Mossnano Launch(MossnanoOptions options)
    {
        return new Mossnano(options, false);
    }

    Mossnano(MossnanoOptions options, bool startThrows)
    {
        if (options.FadeMs < 0 || options.PrebufferMs < 0 || options.PrebufferMs > 1000 * options.RingSeconds)
            throw new ArgumentException("FadeMs " + options.FadeMs + ", PrebufferMs " + options.PrebufferMs
                + ": neither may be negative, and what is gathered must fit into RingSeconds, " + options.RingSeconds);
        patience = TimeSpan.FromSeconds(Math.Min(options.StartSeconds, 1e6)); // timers take no more than some weeks
        this.options = options;
        this.startThrows = startThrows;
        onError = options.OnError;
        reader = new Thread(Run) { IsBackground = true, Name = "Mossnano" };
        reader.Start();
    }

    /// <summary>Adds packed frames, FrameBytes each, to the stream, and opens one where none is open.
    /// False unless the State is Ready, or when more than 4 MiB would wait for the process (`queue_full`, and nothing
    /// of this was taken); the error handler was told why.</summary>
    public bool Feed(byte[] packed)
    {
        if (state != MossnanoState.Ready) return false;
        if (packed.Length % FrameBytes != 0)
            throw new ArgumentException(packed.Length + " bytes are no whole frames: feed a multiple of " + FrameBytes + " bytes");
        int most = Math.Max(1, PieceBytes / FrameBytes) * FrameBytes;
        int pieces = Math.Max(1, (packed.Length + most - 1) / most); // an empty TOKENS too opens a stream, for its END
        long wanted = packed.Length + (long)pieces * HeadBytes, waiting;
        lock (gate)
        {
            if (state != MossnanoState.Ready) return false;
            waiting = queuedBytes;
            if (waiting + wanted <= QueueBytes)
            {
                if (!streamIsOpen) Interlocked.Increment(ref opened);
                streamIsOpen = true;
                for (int at = 0, piece = 0; piece < pieces; piece++, at += most)
                    Enqueue(Tokens, packed, at, Math.Min(most, packed.Length - at));
                return true;
            }
        }
        if (onError != null)
            onError("queue_full", waiting + " bytes wait for the process to take them, and " + wanted + " more were fed: "
                + QueueBytes + " (4 MiB) are allowed, feed less or later", false);
        return false;
    }

    /// <summary>The same for codes, Quantizers for each frame.</summary>
    public bool FeedCodes(int[] codes)
    {
        if (state != MossnanoState.Ready) return false;
        if (codes.Length % Quantizers != 0)
            throw new ArgumentException(codes.Length + " codes are no whole frames: feed a multiple of " + Quantizers);
        int bits = 0;
        while (1 << bits < CodebookSize) bits++;
        var packed = new byte[codes.Length / Quantizers * FrameBytes];
        for (int i = 0; i < codes.Length; i++)
        {
            if (codes[i] < 0 || codes[i] >= CodebookSize)
                throw new ArgumentException("code " + codes[i] + ": 0 to " + (CodebookSize - 1) + " are allowed");
            for (int bit = 0; bit < bits; bit++) // least significant first; each frame starts at a byte
            {
                int at = i % Quantizers * bits + bit;
                packed[i / Quantizers * FrameBytes + at / 8] |= (byte)((codes[i] >> bit & 1) << at % 8);
            }
        }
        return Feed(packed);
    }

    /// <summary>The stream is complete.</summary>
    public bool Finish()
    {
        lock (gate)
        {
            if (streamIsOpen) Enqueue(End, new byte[0], 0, 0);
            streamIsOpen = false;
            return state == MossnanoState.Ready;
        }
    }

    /// <summary>Be silent, now: drops whatever was fed, and all that waits to be pulled.</summary>
    public bool Cancel()
    {
        lock (gate)
        {
            foreach (byte[] message in queue) queuedBytes -= message.Length; // what has not left never will
            queue.Clear();
            streamIsOpen = false;
            cancelled = opened;
            // The puller is silent and the reader drops, until the END of this CANCEL, or of a later one, is back.
            int number = Interlocked.Increment(ref cancels);
            byte[] echo = Encoding.ASCII.GetBytes(FormattableString.Invariant($"{opened} {number}"));
            bool isAnswered = state == MossnanoState.Ready;
            if (isAnswered) Enqueue(CancelKind, echo, 0, echo.Length);
            else AnswerCancel(opened, number);
            return isAnswered;
        }
    }

    /// <summary>The number of the stream that Feed opened last, from 0; -1 before the first.</summary>
    public long Stream { get { return Interlocked.Read(ref opened) - 1; } }

    /// <summary>How much was heard of which stream, as far as we know: less what the sound card still holds.</summary>
    public MossnanoPlayed Played
    {
        get
        {
            long both = Volatile.Read(ref played); // one number, so that they belong together
            return new MossnanoPlayed(both >> SampleBits, both & (1L << SampleBits) - 1);
        }
    }

    /// <summary>Fills pcm, Channels interleaved: with samples, a fade-out where they break off, and silence.
    /// Returns how many samples of all channels are real.</summary>
    public int Pull(short[] pcm)
    {
        Array.Clear(pcm, 0, pcm.Length);
        if (!hasRing) return 0;
        BeginPull(pcm.Length / Channels);
        for (int i = 0; i < audible * Channels; i++) pcm[i] = (short)Value(i / Channels, i % Channels);
        return EndPull();
    }

    /// <summary>The same as floats, for as many channels as the engine has: one gets the mean of all of ours, two and
    /// more get ours in the front pair, and silence in the rest.</summary>
    public int Pull(float[] data, int channels)
    {
        Array.Clear(data, 0, data.Length);
        if (!hasRing) return 0;
        BeginPull(data.Length / channels);
        for (int i = 0; i < audible; i++)
        {
            for (int channel = 0; channel < Channels && channels == 1; channel++)
                data[i] += Value(i, channel) / 32767f / Channels;
            for (int channel = 0; channel < 2 && channels > 1; channel++) // centre, bass and rears stay silent
                data[i * channels + channel] = Value(i, Math.Min(channel, Channels - 1)) / 32767f;
        }
        return EndPull();
    }

    // --- the puller -------------------------------------------------------------------------------------------------
    // Without a lock against the reader. A pull is `real` samples from `pullAt`, then a fade-out, then silence.

    long pullAt;
    int real, audible;               // samples of this pull; audible: the real ones and the fade-out
    int droppedLeft;                 // samples that a CANCEL dropped, and that its fade-out may still use
    int fadeSamples, level;          // level: how loud we are, from 0 to fadeSamples; less only in and after a fade
    bool isFadingOut, wasCut, fadesDropped, isComplete;
    bool isGathering, isFresh;       // fresh: nothing of the stream was given yet: no fade-in, unless we were cut off
    int noticedCancels;
    long cutHeard;                   // the last cutAt that we came to
    long nextStream = -1, stream = -1, heard;         // that is being given out, and how many samples of it were
    long played = -1L << SampleBits; // both, for other threads
    short[] last;                    // the last sample that was given: a fade-out holds it where nothing follows

    void BeginPull(int wanted)
    {
        bool wasSounding = isSounding; // asked before the ring is looked at: what it told of is in there
        long cut = Volatile.Read(ref cutAt);
        long over = Volatile.Read(ref endOfStream);
        long end = Volatile.Read(ref written);
        int number = Volatile.Read(ref cancels); // asked after it: what lies before the end was fed before that CANCEL
        bool isCancelled = number != Volatile.Read(ref cancelsAnswered);
        long dropped = isCancelled ? end : Volatile.Read(ref dropBefore);
        if (number != noticedCancels && level > 0 && !isFadingOut) isFadingOut = wasCut = fadesDropped = true;
        noticedCancels = number;

        real = 0;
        isComplete = false;
        pullAt = isFadingOut ? taken : Math.Max(taken, dropped);
        droppedLeft = isFadingOut && fadesDropped ? (int)Math.Max(0, (dropped - taken) / Channels) : 0;
        if (!isFadingOut) // a fade-out is finished first
        {
            bool isDry = TakeReal(wanted, cut, over, end);
            if (isDry && wasSounding && isSounding && !isCancelled) Interlocked.Increment(ref underruns);
        }
        audible = isFadingOut ? Math.Min(wanted, real + Math.Min(fadeSamples, level + real)) : real;
    }

    bool TakeReal(int wanted, long cut, long over, long end) // says whether the ring was dry
    {
        long at = pullAt;
        bool isCut = false; // what follows is another stream, but this one's last sample is not its end
        while (real < wanted)
        {
            isCut = at == cut && cut != cutHeard && level + real > 0;
            if (at == cut) cutHeard = cut;
            if (isCut) break;
            TakeMarks(at);
            bool isEnough = end - at >= (long)(options.PrebufferMs * SampleRate / 1000) * Channels;
            bool isWhole = over > at || cut > at; // more of this stream does not come
            bool isGathered = !isGathering || (isEnough || isWhole) && end > at;
            long nextMark = marksTaken < Volatile.Read(ref marksWritten) ? markAt[marksTaken % MostMarks] : end;
            long until = Math.Min(Math.Min(end, nextMark), cut > at ? cut : end);
            int more = isGathered ? (int)Math.Min(wanted - real, (until - at) / Channels) : 0;
            if (more <= 0) break;
            if (isFresh && real == 0 && !wasCut) level = fadeSamples;
            if (isFresh) { stream = nextStream; heard = 0; }
            isFresh = isGathering = wasCut = false;
            real += more;
            heard += more;
            at += more * Channels;
        }
        if (real == wanted) return false;
        isComplete = at == over || isGathering; // the stream ends here as it should, with its own last sample
        if (!isComplete && level + real > 0 && fadeSamples > 0) { isFadingOut = wasCut = true; fadesDropped = false; }
        bool isDry = !isGathering && !isCut;
        isGathering = options.PrebufferMs > 0;
        return isDry;
    }

    void TakeMarks(long at)
    {
        while (marksTaken < Volatile.Read(ref marksWritten) && markAt[marksTaken % MostMarks] <= at)
        {
            isFresh = true;
            nextStream = markStream[marksTaken % MostMarks];
            isGathering = options.PrebufferMs > 0;
            Volatile.Write(ref marksTaken, marksTaken + 1);
        }
    }

    int Value(int sample, int channel)
    {
        if (sample < real)
        {
            int loud = level + sample + 1, value = ring[(pullAt + (long)sample * Channels + channel) % ring.Length];
            return loud >= fadeSamples ? value : (int)((long)value * loud / fadeSamples);
        }
        int left = Math.Min(fadeSamples, level + real) - (sample - real) - 1; // of the fade-out
        int from = droppedLeft > 0 ? Math.Min(sample, droppedLeft - 1) : real - 1;
        int held = from < 0 ? last[channel] : ring[(pullAt + (long)from * Channels + channel) % ring.Length];
        return (int)((long)held * left / fadeSamples);
    }

    int EndPull()
    {
        int given = real + Math.Min(audible - real, droppedLeft);
        for (int channel = 0; channel < Channels && given > 0; channel++)
            last[channel] = ring[(pullAt + (long)(given - 1) * Channels + channel) % ring.Length];
        level = isComplete ? 0 : Math.Min(fadeSamples, level + real) - (audible - real);
        isFadingOut &= level > 0;
        Volatile.Write(ref played, stream << SampleBits | heard);
        // Only now: from here on the reader may write over what was given.
        Volatile.Write(ref taken, pullAt + (long)given * Channels);
        return real;
    }

    bool IsCancelled { get { return Volatile.Read(ref cancels) != Volatile.Read(ref cancelsAnswered); } }

    /// <summary>Is something to be pulled, now or later?</summary>
    public bool IsSpeaking
    {
        get
        {
            // Asked first: what came is in the ring.
            bool moreComes = !isGone && Interlocked.Read(ref ended) < Interlocked.Read(ref opened);
            long end = Volatile.Read(ref written);
            return moreComes || (Volatile.Read(ref taken) < end && Volatile.Read(ref dropBefore) < end && !IsCancelled);
        }
    }

    /// <summary>Pulls that found the ring dry in the middle of a stream.</summary>
    public long Underruns { get { return Interlocked.Read(ref underruns); } }

    public void Dispose()
    {
        if (isStopping) return;
        isStopping = true;
        stopping.Set();
        Cancel();
        lock (gate)
        {
            isClosing = true;
            Monitor.PulseAll(gate);
        }
        bool isReader = Thread.CurrentThread == reader; // called by OnError
        if (isReader || !reader.Join(StopMs)) Kill();
        if (!isReader) reader.Join(StopMs);
        if (!isReader && writer != null) writer.Join(StopMs);
        state = MossnanoState.Stopped;
    }

    // --- the process ------------------------------------------------------------------------------------------------

    const string TooLate = "no HANDSHAKE in time: allow more startSeconds, or look at its stderr";

    void Run() // what the reader does
    {
        while (RunProcess())
        {
            int pause = Math.Min(FirstPauseMs << Math.Min(restartsInARow, 10), LongestPauseMs);
            restartsInARow++;
            if (stopping.WaitOne(pause)) break;
            restarts++;
        }
        if (isStopping) state = MossnanoState.Stopped;
        started.Set();
    }

    bool RunProcess() // says whether it is to be started again
    {
        fatalWasSaid = isLate = false;
        string whyNot = StartProcess();
        if (whyNot != null) return Bury("not_started", whyNot);
        Thread log = StartLog();
        int launch = launches;
        using (new Timer(_ => EndIfLate(launch), null, patience, Timeout.InfiniteTimeSpan)) ReadMessages();
        process.WaitForExit();
        if (log != null) log.Join(StopMs); // its last lines say why
        int status = process.ExitCode;
        process.Dispose();
        if (isLate) return Bury("timeout", TooLate);
        return Bury("process_ended", "the process ended by itself with status " + status + ": its stderr says more");
    }

    string StartProcess() // says why it cannot be started
    {
        string[] command = options.Command;
        var words = new StringBuilder();
        for (int i = 1; i < command.Length; i++) words.Append(Quoted(command[i])).Append(' ');
        var how = new ProcessStartInfo(command[0], words.ToString())
        {
            UseShellExecute = false, CreateNoWindow = true, RedirectStandardInput = true, RedirectStandardOutput = true,
            RedirectStandardError = options.Log != null,
        };
        if (options.Log != null) how.StandardErrorEncoding = Encoding.UTF8;
        try { process = StartWithoutPreamble(how); }
        catch (Win32Exception error)
        {
            return command[0] + " cannot be started (" + error.Message + "): is it installed and on the PATH?";
        }
        output = process.StandardOutput.BaseStream;
        Stream input = process.StandardInput.BaseStream;
        int launch;
        lock (gate)
        {
            launch = ++launches;
            isGone = false;
        }
        pid = process.Id;
        writer = new Thread(() => Write(input, launch)) { IsBackground = true, Name = "Mossnano writer" };
        writer.Start();
        if (isStopping) Kill(); // Dispose came too early to do it
        if (process.StandardInput.Encoding.GetPreamble().Length == 0) return null;
        Kill();
        return "a byte order mark went before our first message: set Console.InputEncoding = new UTF8Encoding(false)";
    }

    Thread StartLog()
    {
        if (options.Log == null) return null;
        StreamReader lines = process.StandardError;
        var log = new Thread(() => ReadLog(lines)) { IsBackground = true, Name = "Mossnano log" };
        log.Start();
        return log;
    }

    void ReadLog(StreamReader lines)
    {
        string line;
        do
        {
            try { line = lines.ReadLine(); }
            catch (IOException) { return; }
            catch (ObjectDisposedException) { return; } // a child of the process held on to its stderr for too long
            if (line != null) options.Log(line);
        } while (line != null);
    }

    void EndIfLate(int launch)
    {
        lock (gate)
        {
            if (state != MossnanoState.Starting || launch != launches) return;
            isLate = true;
        }
        Kill();
    }

    void Kill()
    {
        try { if (process != null) process.Kill(); }
        catch (InvalidOperationException) { } // it is gone already
        catch (Win32Exception) { }            // it is going
    }

    // A process that never became ready would not do so the next time.
    bool MayRestart { get { return hasRing && !isStopping && restartsInARow < options.Restart; } }

    bool Bury(string code, string message) // what came of its streams can still be pulled, and then fades out
    {
        bool isRestarted = MayRestart;
        var lost = new List<long>();
        lock (gate)
        {
            for (long number = Math.Max(ended, cancelled); number < opened; number++) lost.Add(number);
            launches++;
            queue.Clear();
            queuedBytes = 0;
            Monitor.PulseAll(gate);
            streamIsOpen = isSounding = false;
            Volatile.Write(ref cutAt, written);
            AnswerCancel(opened, cancels);
            isGone = true;
            pid = 0;
            if (!fatalWasSaid) fault = code == "process_ended" ? message + " (" + code + ")" : message;
            if (!isRestarted) Reason = fault;
            state = isRestarted ? MossnanoState.Starting : isStopping ? MossnanoState.Stopped : MossnanoState.Failed;
        }
        if (isStopping) return false;
        if (lost.Count > 0 && options.OnLost != null) options.OnLost(lost.ToArray());
        string without = lost.Count > 0 ? ", without what was fed to the streams " + string.Join(", ", lost) : "";
        if (isRestarted) Say(code, message + "; it is started again" + without, true);
        else if (!fatalWasSaid) Say(code, message, true);
        return isRestarted;
    }

    // --- the reader -------------------------------------------------------------------------------------------------

    void ReadMessages()
    {
        var head = new byte[HeadBytes];
        var payload = new byte[LongestMessage];
        while (ReadAll(head, HeadBytes))
        {
            uint length = head[0] | (uint)head[1] << 8 | (uint)head[2] << 16 | (uint)head[3] << 24;
            bool isMessage = length >= 1 && length <= LongestMessage;
            if (!isMessage) Say("framing_lost", "the program does not speak the protocol: does something print to its stdout?", true);
            if (isMessage && !ReadAll(payload, (int)length - 1)) break;
            if (isMessage && Take(head[4], payload, (int)length - 1)) continue;
            Kill();
            break;
        }
    }

    bool ReadAll(byte[] into, int bytes)
    {
        try
        {
            for (int got, at = 0; at < bytes; at += got)
                if ((got = output.Read(into, at, bytes - at)) <= 0) return false;
            return true;
        }
        catch (IOException) { return false; }
    }

    bool Take(int kind, byte[] payload, int bytes) // unknown kinds and keys are passed over
    {
        if (kind == Audio && hasRing) Push(payload, bytes / 2);
        if (kind != Handshake && kind != Error && kind != End) return true;
        var said = Fields(Encoding.UTF8.GetString(payload, 0, bytes));
        if (kind == Handshake && state == MossnanoState.Starting) return ShakeHands(said);
        if (kind == Error) Say(said["code"], said["message"], said["fatal"] == "true");
        if (kind == End) FinishStream(said);
        return true;
    }

    bool ShakeHands(Dictionary<string, string> said)
    {
        Func<string, int> number = name =>
        {
            string text;
            int value;
            return said.TryGetValue(name, out text) && int.TryParse(text, out value) ? value : 0;
        };
        var numbers = new[]
        {
            "sample_rate", "channels", "frame_samples", "quantizers", "codebook_size", "frame_bytes", "max_audio_bytes",
        };
        string direction;
        bool isOurs = number("protocol") == 1 && said.TryGetValue("direction", out direction) && direction == "decode";
        foreach (string name in numbers) isOurs &= number(name) >= 1;
        if (!isOurs)
        {
            Say("handshake", "this is no decoder of protocol 1: update Mossnano.cs, or drop --encode", true);
            return false;
        }
        foreach (string name in numbers)
            if (hasRing && said[name] != Format[name])
            {
                string change = name + " was " + Format[name] + " and is now " + said[name];
                Say("handshake", change + ": start a new voice for other weights", true);
                return false;
            }
        Format = said;
        string version, demo;
        Version = said.TryGetValue("version", out version) ? version : "";
        Demo = said.TryGetValue("demo", out demo) && demo == "true";
        SampleRate = number("sample_rate"); Channels = number("channels"); FrameSamples = number("frame_samples");
        Quantizers = number("quantizers"); CodebookSize = number("codebook_size");
        FrameBytes = number("frame_bytes"); MaxAudioBytes = number("max_audio_bytes");
        if (!hasRing) MakeRing();
        lock (gate)
        {
            if (isLate) return false;
            state = MossnanoState.Ready;
        }
        started.Set();
        return true;
    }

    void MakeRing()
    {
        ring = new short[(int)(options.RingSeconds * SampleRate) * Channels + MaxAudioBytes / 2];
        last = new short[Channels];
        fadeSamples = (int)(options.FadeMs * SampleRate / 1000);
        hasRing = true;
    }

    void Push(byte[] pcm, int values)
    {
        if (markedStream != Interlocked.Read(ref ended)) Mark();
        for (int i = 0; i < values && !IsCancelled && !isStopping;)
        {
            long at = written, room = ring.Length - (at - Volatile.Read(ref taken));
            if (room == 0) { Thread.Sleep(2); continue; } // asleep, not signalled: the puller must not touch a lock
            long end = at + Math.Min(room, values - i);
            for (; at < end; at++, i++) ring[at % ring.Length] = (short)(pcm[2 * i] | pcm[2 * i + 1] << 8);
            Volatile.Write(ref written, end);
            isSounding = true;
        }
    }

    void Mark() // a stream begins here
    {
        while (marksWritten - Volatile.Read(ref marksTaken) == MostMarks)
        {
            if (IsCancelled || isStopping) return; // nothing of it will be pulled
            Thread.Sleep(2);
        }
        markedStream = Interlocked.Read(ref ended);
        markAt[marksWritten % MostMarks] = written;
        markStream[marksWritten % MostMarks] = markedStream;
        Volatile.Write(ref marksWritten, marksWritten + 1);
    }

    void FinishStream(Dictionary<string, string> said)
    {
        Volatile.Write(ref endOfStream, written);
        isSounding = false;
        if (said["cancelled"] != "true")
        {
            Interlocked.Increment(ref ended);
            restartsInARow = 0;
            return;
        }
        string[] echo = said["echo"].Split(' ');
        CultureInfo plain = CultureInfo.InvariantCulture;
        AnswerCancel(long.Parse(echo[0], plain), int.Parse(echo[1], plain));
    }

    void AnswerCancel(long streams, int number) // all that were open at it are over
    {
        Interlocked.Exchange(ref ended, streams);
        if (IsCancelled) Volatile.Write(ref dropBefore, written);
        Volatile.Write(ref cancelsAnswered, number);
    }

    void Say(string code, string message, bool fatal)
    {
        fatalWasSaid |= fatal;
        if (isStopping) return;
        if (fatal || !hasRing) fault = message + " (" + code + ")";
        if (onError != null && (hasRing || !startThrows)) onError(code, message, fatal && !MayRestart);
    }

    // --- the writer -------------------------------------------------------------------------------------------------

    void Enqueue(int kind, byte[] payload, int at, int bytes) // whoever calls this holds the gate
    {
        var message = new byte[HeadBytes + bytes]; // a copy: the caller may use the payload's array again
        for (int i = 0; i < 4; i++) message[i] = (byte)(bytes + 1 >> 8 * i);
        message[4] = (byte)kind;
        Buffer.BlockCopy(payload, at, message, HeadBytes, bytes);
        queue.Enqueue(message);
        queuedBytes += message.Length;
        Monitor.PulseAll(gate);
    }

    void Write(Stream input, int launch)
    {
        for (byte[] message = null; (message = NextToWrite(message, launch)) != null;)
            try { input.Write(message, 0, message.Length); input.Flush(); }
            catch (IOException) { }             // the reader finds out why
            catch (ObjectDisposedException) { }
        try { input.Close(); } catch (IOException) { }
    }

    byte[] NextToWrite(byte[] maybeWritten, int launch) // null: that was all, for the process of that launch
    {
        lock (gate)
        {
            if (maybeWritten != null && launch == launches) queuedBytes -= maybeWritten.Length;
            while (queue.Count == 0 && !isClosing && launch == launches) Monitor.Wait(gate);
            return queue.Count == 0 || launch != launches ? null : queue.Dequeue();
        }
    }

    // The texts, numbers, true and false of the outermost JSON object, as texts.
    static Dictionary<string, string> Fields(string json)
    {
        var fields = new Dictionary<string, string>();
        string maybeKey = null;
        int depth = 0;
        for (int at = 0; at < json.Length; at++)
        {
            char c = json[at];
            if (c == '{' || c == '[') { depth++; if (depth > 1) maybeKey = null; }
            else if (c == '}' || c == ']') depth--;
            else if (c == '"')
            {
                string text = Text(json, ref at);
                if (depth != 1) continue;
                if (maybeKey == null) maybeKey = text;
                else { fields[maybeKey] = text; maybeKey = null; }
            }
            else if (depth == 1 && maybeKey != null && (char.IsLetterOrDigit(c) || c == '-'))
            {
                int start = at;
                while (at + 1 < json.Length && ",}] \t\r\n".IndexOf(json[at + 1]) < 0) at++;
                fields[maybeKey] = json.Substring(start, at + 1 - start);
                maybeKey = null;
            }
        }
        return fields;
    }

    static string Text(string json, ref int at) // from the opening quote to the closing one
    {
        var text = new StringBuilder();
        for (at++; at < json.Length && json[at] != '"'; at++)
        {
            if (json[at] != '\\' || at + 1 >= json.Length) { text.Append(json[at]); continue; }
            char c = json[++at];
            if (c == 'u' && at + 4 < json.Length) { text.Append((char)Convert.ToInt32(json.Substring(at + 1, 4), 16)); at += 4; }
            else text.Append("bfnrt".IndexOf(c) >= 0 ? ' ' : c);
        }
        return text.ToString();
    }

    // .NET Framework and Mono open stdin with a StreamWriter, and write its encoding's byte order mark at once, before
    // our first message. The encoding is Console.InputEncoding, unless there is a StandardInputEncoding (Mono 6, .NET
    // Core 2.1 and later). Where there is none, the host's own encoding is put aside for the moment, in its field: the
    // public setter would reopen the host's console streams.
    static readonly object oneAtATime = new object();

    static Process StartWithoutPreamble(ProcessStartInfo how)
    {
        var plain = new UTF8Encoding(false);
        PropertyInfo encoding = typeof(ProcessStartInfo).GetProperty("StandardInputEncoding");
        FieldInfo field = typeof(Console).GetField("_inputEncoding", BindingFlags.Static | BindingFlags.NonPublic)
            ?? typeof(Console).GetField("inputEncoding", BindingFlags.Static | BindingFlags.NonPublic);
        if (encoding != null) encoding.SetValue(how, plain, null);
        bool hasPreamble = encoding == null && Console.InputEncoding.GetPreamble().Length > 0;
        if (!hasPreamble || field == null) return Process.Start(how);
        lock (oneAtATime)
        {
            object hosts = field.GetValue(null);
            field.SetValue(null, plain);
            try { return Process.Start(how); }
            finally { field.SetValue(null, hosts); }
        }
    }

    static string Quoted(string word) // as the C runtime takes it apart again; Mono reads it alike
    {
        var quoted = new StringBuilder("\"");
        int slashes = 0;
        foreach (char c in word)
        {
            if (c == '"') quoted.Append('\\', slashes + 1);
            slashes = c == '\\' ? slashes + 1 : 0;
            quoted.Append(c);
        }
        return quoted.Append('\\', slashes).Append('"').ToString();
    }
}
