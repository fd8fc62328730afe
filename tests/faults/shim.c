/* A disk that dies or fails at the n-th call that changes it: loaded before the C library (LD_PRELOAD), armed by `arm`.

   Counted are the calls of this process on files below one folder: write, pwrite, fsync, fdatasync, ftruncate, rename, unlink, rmdir, mkdir
   and open of a file to be made; SQLite's are among them. What is done at the n-th call, from 1:
   1 the process ends before it; 2 half of it is written, then the process ends; 3 the process ends after it; 4 it fails, once;
   5 it and all later ones fail. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { NOTHING, BEFORE, HALF, AFTER, ONCE, ALWAYS };
static char root[4096];
static long at, seen;
static int how, code;

void arm(const char *folder, long number, int action, int error) {
    strncpy(root, folder, sizeof root - 1);
    at = number; how = action; code = error; seen = 0;
}
long counted(void) { return seen; }

static int below(const char *path) {
    char here[4096];
    if (!root[0] || !path) return 0;
    if (path[0] != '/') { /* the sweep names everything absolutely */
        if (!getcwd(here, sizeof here)) return 0;
        path = here;
    }
    return strncmp(path, root, strlen(root)) == 0;
}
static int below_fd(int fd) {
    char name[64], path[4096];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(name, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return path[0] == '/' && below(path); /* a pipe is called pipe:[17], and is no file of any folder */
}
/* What is to be done at this call: NOTHING for most. */
static int step(void) {
    ++seen;
    if (!at || seen < at || (seen > at && how != ALWAYS)) return NOTHING;
    if (how == BEFORE) _exit(77);
    if (how == ONCE || how == ALWAYS) errno = code;
    return how;
}
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CALL(type, name, inside, arguments) \
    int todo = (inside) ? step() : NOTHING; \
    if (todo == ONCE || todo == ALWAYS) return -1; \
    type result = REAL(name) arguments; \
    if (todo == AFTER || todo == HALF) _exit(77); \
    return result;
#define WRITE(type, name, arguments, half) \
    int todo = below_fd(fd) ? step() : NOTHING; \
    if (todo == ONCE || todo == ALWAYS) return -1; \
    if (todo == HALF) { REAL(name) half; _exit(77); } \
    type result = REAL(name) arguments; \
    if (todo == AFTER) _exit(77); \
    return result;

ssize_t write(int fd, const void *data, size_t n) { WRITE(ssize_t, write, (fd, data, n), (fd, data, n / 2)) }
ssize_t pwrite(int fd, const void *data, size_t n, off_t o) { WRITE(ssize_t, pwrite, (fd, data, n, o), (fd, data, n / 2, o)) }
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t o) { WRITE(ssize_t, pwrite64, (fd, data, n, o), (fd, data, n / 2, o)) }
int fsync(int fd) { CALL(int, fsync, below_fd(fd), (fd)) }
int fdatasync(int fd) { CALL(int, fdatasync, below_fd(fd), (fd)) }
int ftruncate(int fd, off_t n) { CALL(int, ftruncate, below_fd(fd), (fd, n)) }
int ftruncate64(int fd, off64_t n) { CALL(int, ftruncate64, below_fd(fd), (fd, n)) }
int rename(const char *from, const char *to) { CALL(int, rename, below(to), (from, to)) }
int unlink(const char *path) { CALL(int, unlink, below(path), (path)) }
int rmdir(const char *path) { CALL(int, rmdir, below(path), (path)) }
int mkdir(const char *path, mode_t mode) { CALL(int, mkdir, below(path), (path, mode)) }
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; va_start(rest, flags); \
        mode_t mode = (flags & O_CREAT) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        CALL(int, name, (flags & O_CREAT) && below(path), (path, flags, mode)) \
    }
OPEN(open)
OPEN(open64)
