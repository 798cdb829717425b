# sh start.sh FOLDER PROGRAM [...]: runs a program in a job's folder, so that what it leaves goes with that. Words with a
# slash are paths from the home folder, where a session begins.
home=$PWD
cd "$1" || exit 125
shift
for word; do
    shift
    case $word in */*) word=$home/$word ;; esac
    set -- "$@" "$word"
done
exec "$@"
