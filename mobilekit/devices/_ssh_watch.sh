# sh watch.sh SECONDS PROGRAM [...]: runs a measuring program of the user's own on a board, and ends it when standard
# input ends, which it does with the connection, or after so many seconds. Plain POSIX: busybox has no more.
seconds=$1
shift
exec 3<&0
"$@" < /dev/null 3<&- &
program=$!
(
    trap 'kill "$!" 2> /dev/null; exit' TERM
    cat <&3 > /dev/null &
    wait "$!"
    kill -9 "$program"
) 2> /dev/null &
reader=$!
(
    trap 'kill "$!" 2> /dev/null; exit' TERM
    sleep "$seconds" 3<&- &
    wait "$!"
    kill -9 "$program"
) 2> /dev/null > /dev/null &
timer=$!
exec 3<&- < /dev/null
wait "$program"
code=$?
kill "$reader" "$timer" 2> /dev/null
wait
exit "$code"
