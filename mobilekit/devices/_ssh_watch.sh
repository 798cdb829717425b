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
    sleep "$seconds" &
    wait "$!"
    kill -9 "$program"
) 2> /dev/null > /dev/null 3<&- &
timer=$!
exec 3<&- < /dev/null
trap '' PIPE # the shell says of a program that it was killed, and nobody may be there to read it
wait "$program" 2> /dev/null
code=$?
kill "$reader" "$timer" 2> /dev/null
wait
exit "$code"
