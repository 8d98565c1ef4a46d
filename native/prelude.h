/* SPDX-License-Identifier: MIT
 *
 * zswapfs.h for C, which it cannot guard itself: for the core and for the generated binding.
 */
#ifndef PRELUDE_H
#define PRELUDE_H

#include <stdint.h>

#include "zswapfs.h"

#endif
