/* Preloaded by a test: the machine's wall clock as these processes see it, moved by what a mapped file says.
 *
 * CLOCK_MONOTONIC stays as it is, as when an administrator or NTP sets the time. Waits that are given an absolute
 * time of the wall clock get it in the machine's own time, so that they end when they should.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t none;
static volatile int64_t* seconds = &none;

__attribute__((constructor)) static void map_offset(void) {
  const char* path = getenv("WALL_CLOCK_OFFSET");
  int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (fd < 0) {
    return;
  }
  void* mapped = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, fd, 0);
  if (mapped != MAP_FAILED) {
    seconds = mapped;
  }
  close(fd);
}

int clock_gettime(clockid_t clock, struct timespec* now) {
  int failed = (int)syscall(SYS_clock_gettime, clock, now);
  if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
    now->tv_sec += *seconds;
  }
  return failed;
}

int gettimeofday(struct timeval* restrict now, void* restrict zone) {
  (void)zone;
  struct timespec exact;
  clock_gettime(CLOCK_REALTIME, &exact);
  now->tv_sec = exact.tv_sec;
  now->tv_usec = exact.tv_nsec / 1000;
  return 0;
}

time_t time(time_t* out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) {
    *out = now.tv_sec;
  }
  return now.tv_sec;
}

static struct timespec unmoved(const struct timespec* until) {
  struct timespec real = *until;
  real.tv_sec -= *seconds;
  return real;
}

int sem_timedwait(sem_t* semaphore, const struct timespec* until) {
  static int (*next)(sem_t*, const struct timespec*);
  if (!next) {
    next = (int (*)(sem_t*, const struct timespec*))dlsym(RTLD_NEXT, "sem_timedwait");
  }
  struct timespec real = unmoved(until);
  return next(semaphore, &real);
}

int pthread_cond_clockwait(pthread_cond_t* cond, pthread_mutex_t* mutex, clockid_t clock,
                           const struct timespec* until) {
  static int (*next)(pthread_cond_t*, pthread_mutex_t*, clockid_t, const struct timespec*);
  if (!next) {
    next = (int (*)(pthread_cond_t*, pthread_mutex_t*, clockid_t, const struct timespec*))dlsym(
        RTLD_NEXT, "pthread_cond_clockwait");
  }
  struct timespec real = clock == CLOCK_REALTIME ? unmoved(until) : *until;
  return next(cond, mutex, clock, &real);
}
