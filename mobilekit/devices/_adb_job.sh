# What mobilekit runs on an Android device: sh job.sh FOLDER ID COMMAND [...]. Copied into FOLDER/jobs/ID, where all files
# of one measurement lie; FOLDER/models keeps models under their sha256 from one measurement to the next.
# Only what mksh, toybox and busybox have is used. Each command prints lines that begin with a word, and "end" at last.

folder=$1
id=$2
command=$3
shift 3
job=$folder/jobs/$id

python_here() {
    for found in "$(command -v python3)" /data/data/com.termux/files/usr/bin/python3; do
        if [ -x "$found" ]; then
            echo "$found"
            return
        fi
    done
}

# Models that were not used for a minute leave when all of them take more than 200 MB: a profile is built of thousands.
trim() {
    size=$(du -sk "$folder/models" 2> /dev/null)
    size=${size%%[!0-9]*}
    if [ "${size:-0}" -gt 200000 ]; then
        find "$folder/models" -mindepth 1 -maxdepth 1 -mmin +1 -exec rm -f {} \; 2> /dev/null
    fi
}

# Makes room and says what there is, also of the models that are wanted: the comments at the end of this file. +1: toybox counts whole days in another way than others; never less than one.
prepare() {
    find "$folder/jobs" "$folder/models" -mindepth 1 -maxdepth 1 -mtime +1 -exec rm -rf {} \; 2> /dev/null
    mkdir -p "$folder/models" "$job/new" || return
    echo "architecture $(uname -m)"
    python=$(python_here)
    if [ -n "$python" ]; then
        echo "python $python"
        "$python" -c 'import numpy' > /dev/null 2>&1 && echo numpy
    fi
    sed -n 's/^# wanted //p' "$job/job.sh" | while read -r name; do
        if [ -f "$folder/models/$name" ]; then touch "$folder/models/$name" && sha256sum "$folder/models/$name"; fi
    done 2> /dev/null | sed 's/^/model /'
    trim
    echo end
}

# run SECONDS FILE: measures. Everything that is started has the job's name in its environment (MOBILEKIT_JOB).
run() {
    seconds=$1
    program=$job/$2
    cd "$job" || return
    for file in new/*; do
        # the copied time is that of the file on the computer; it says here how long ago it was used
        if [ -f "$file" ]; then touch "$file" && mv -f "$file" "$folder/models/"; fi
    done
    chmod 755 "$program"
    set -- "$program"
    case $program in *.py) set -- "$(python_here)" "$program" ;; esac
    if [ -t 0 ]; then # an old device: a terminal that ends what it started when the connection breaks
        exec 3< /dev/null
    else
        exec 3<&0
        set -- "$@" --watch-stdin
    fi
    if timeout -k 1 5 true 2> /dev/null; then set -- timeout -k 5 "$seconds" "$@"; fi
    "$@" "$job/request.json" "$job/result.json" <&3 > out 2> err
    echo $? > exit.part
    mv exit.part exit
}

running() {
    grep -l "MOBILEKIT_JOB=$id" /proc/[0-9]*/environ 2> /dev/null | sed 's/[^0-9]//g'
}

# Ends what still runs and says how it went.
stop() {
    if [ -f "$job/exit" ]; then echo "exit $(cat "$job/exit")"; fi
    for attempt in 1 2 3 4 5; do
        left=$(running)
        if [ -z "$left" ]; then break; fi
        kill -9 $left 2> /dev/null # one number a word
    done
    if [ -n "$left" ]; then echo "left $left"; fi
    if [ -f "$job/result.json" ]; then echo result; fi
    tail -c 20000 "$job/out" 2> /dev/null | sed 's/^/out /'
    echo
    tail -c 2000 "$job/err" 2> /dev/null | sed 's/^/err /'
    echo
    echo end
}

# Asks what the device is (facts.sh) and which runtimes its python3 has.
facts() {
    sh "$job/facts.sh" < /dev/null 2> /dev/null
    "$(python_here)" -c '
import importlib.metadata as metadata
for name in ("onnxruntime", "tflite-runtime", "ai-edge-litert"):
    try:
        print("version", name, metadata.version(name))
    except metadata.PackageNotFoundError:
        pass
' 2> /dev/null
    echo end
}

remove() {
    stop > /dev/null
    trim
    cd "$folder" && rm -rf "$job" && echo end
}

case $command in
prepare | run | stop | facts | remove) "$command" "$@" ;;
esac
